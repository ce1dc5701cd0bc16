"""Any OpenAI-compatible server (vLLM, SGLang, llama.cpp, a hosted one), through the official client."""

import asyncio
import math
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from openai import AsyncOpenAI, OpenAIError

from mote.engines.protocol import Completion, Prompt
from mote.errors import MoteError

Result = TypeVar("Result")


class ServerEngine:
    """A model behind an address such as `http://localhost:8000/v1`.

    The key is read from `OPENAI_API_KEY`, where the server wants one. The client repeats requests that fail with
    429, 5xx or a broken connection, with exponential backoff.

    Args:
        address: The server's /v1 address.
        model: The name it serves the model under.
        concurrency: Requests in flight at most.
        retries: Times a failed request is repeated.
        timeout: Seconds a request may take.
    """

    def __init__(
        self, address: str, model: str, concurrency: int = 32, retries: int = 5, timeout: float = 600.0
    ) -> None:
        self.name = model
        self.address = address
        self._concurrency = concurrency
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self._client: Callable[[], AsyncOpenAI] = lambda: AsyncOpenAI(
            base_url=address, api_key=key, max_retries=retries, timeout=timeout
        )

    def write(self, prompts: Sequence[Prompt]) -> list[Completion]:
        """See `Engine.write`.

        Raises:
            MoteError: The server did not answer, or answered with an error that repeating did not cure.
        """
        return asyncio.run(self._all(prompts, self._write))

    def choose(self, prompts: Sequence[Prompt], choices: tuple[str, str]) -> list[float]:
        """See `Engine.choose`; from the log-probabilities of the first token, or from the written word without them.

        Raises:
            MoteError: As `write`.
        """

        async def one(client: AsyncOpenAI, prompt: Prompt) -> float:
            return await self._choose(client, prompt, choices)

        return asyncio.run(self._all(prompts, one))

    async def _all(
        self, prompts: Sequence[Prompt], ask: Callable[[AsyncOpenAI, Prompt], Awaitable[Result]]
    ) -> list[Result]:
        slots = asyncio.Semaphore(self._concurrency)

        async def one(client: AsyncOpenAI, prompt: Prompt) -> Result:
            async with slots:
                return await ask(client, prompt)

        try:
            async with self._client() as client:
                return list(await asyncio.gather(*(one(client, prompt) for prompt in prompts)))
        except OpenAIError as error:
            raise MoteError(
                f"engine: {self.address} failed ({str(error).splitlines()[0]}); see that the server runs and serves "
                f"'{self.name}', then run the same command again: finished rows are kept"
            ) from error

    async def _ask(self, client: AsyncOpenAI, prompt: Prompt, **extra: Any) -> Any:
        answer = await client.chat.completions.create(
            model=self.name,
            messages=[{"role": m.role, "content": m.content} for m in prompt.messages],  # type: ignore[misc]
            temperature=prompt.temperature,
            top_p=prompt.top_p,
            seed=prompt.seed % 2**31,
            **extra,
        )
        if not getattr(answer, "choices", None):
            raise OpenAIError("the answer holds no choices")
        return answer

    async def _write(self, client: AsyncOpenAI, prompt: Prompt) -> Completion:
        answer = await self._ask(client, prompt, max_tokens=prompt.max_tokens)
        choice = answer.choices[0]
        return Completion(
            text=(choice.message.content or "").strip(),
            tokens=answer.usage.completion_tokens if answer.usage else 0,
            finish="stop" if choice.finish_reason == "stop" else "length",
        )

    async def _choose(self, client: AsyncOpenAI, prompt: Prompt, choices: tuple[str, str]) -> float:
        answer = await self._ask(client, prompt, max_tokens=4, logprobs=True, top_logprobs=20)
        choice = answer.choices[0]
        mass = [0.0, 0.0]
        if choice.logprobs and choice.logprobs.content:
            for token in choice.logprobs.content[0].top_logprobs:
                word = token.token.strip().lower()
                for i, name in enumerate(choices):
                    if word and name.lower().startswith(word):
                        mass[i] += math.exp(token.logprob)
        if sum(mass) > 0:
            return mass[0] / sum(mass)
        written = (choice.message.content or "").strip().lower()
        return 1.0 if written.startswith(choices[0].lower()) else 0.0
