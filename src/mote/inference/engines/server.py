"""OpenAI-compatible servers (vLLM, SGLang, llama.cpp, a hosted one), one or several, through the official client."""

import asyncio
import math
import os
from typing import Any, NoReturn

from aiohttp import ClientError
from openai import APIConnectionError, APIStatusError, AsyncOpenAI, DefaultAioHttpClient, OpenAIError, Timeout
from pydantic import ValidationError

from mote.chains.engine import Completion, Preference, Prompt, Refused
from mote.core.errors import MoteError, UserError
from mote.inference.engines.endpoints import Endpoint, Endpoints, backoff
from mote.inference.engines.replies import OF_ONE_REQUEST, Choice, Reply, may_pass, said, wait_of

_CONNECT = 30.0  # seconds until a machine that is off counts as such


class _Stumble(Exception):
    """An attempt that may succeed when it is repeated.

    Attributes:
        reason: What happened.
        busy: The server works, and asks for patience.
        wait: Seconds it asked for, where it said so.
    """

    def __init__(self, reason: str, busy: bool = False, wait: float | None = None) -> None:
        self.reason, self.busy, self.wait = reason, busy, wait


class ServerEngine:
    """A model behind one or several addresses such as `http://localhost:8000/v1`.

    Requests go to the least busy address that answers. One that fails three times in a row is set aside, its requests
    go on at another one, and it is tried again later. The key is read from `OPENAI_API_KEY`, where a server wants one.

    Args:
        addresses: The servers' /v1 addresses with commas between them, as in a recipe; all serve the same model.
        model: The name they serve the model under.
        concurrency: Requests in flight at most, over all addresses.
        retries: Times a request that failed is repeated: 5xx, a broken connection, a timeout, or a reply that is no
            chat completion. A server that is busy (429, or any error with Retry-After) does not use them up; it is
            waited for until `timeout`.
        timeout: Seconds one attempt may take.
    """

    def __init__(
        self, addresses: str, model: str, concurrency: int = 256, retries: int = 5, timeout: float = 600.0
    ) -> None:
        self.name = model
        self._retries, self._timeout = retries, timeout
        each = [address.strip() for address in addresses.split(",")]
        self._endpoints = Endpoints(each, retries)
        self._slots = asyncio.Semaphore(concurrency)
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self._http = DefaultAioHttpClient()
        waiting = Timeout(timeout, connect=min(_CONNECT, timeout))
        self._clients = {
            address: AsyncOpenAI(base_url=address, api_key=key, max_retries=0, timeout=waiting, http_client=self._http)
            for address in each
        }

    async def write(self, prompt: Prompt) -> Completion:
        """See `Engine.write`; where the server does not count, `tokens` is 0 and `read` None.

        Raises:
            Refused: The server refuses this request (400, 413, 422): it is not repeated.
            UserError: It refuses the key, the model or the like (401, 404, ...).
            MoteError: No server answered, or none as it should, however often it was asked.
        """
        reply = await self._ask(prompt, max_tokens=prompt.max_tokens)
        choice = reply.choices[0]
        return Completion(
            text=_text(choice),
            tokens=reply.counted.completion_tokens,
            finish="stop" if choice.finish_reason == "stop" else "length",
            prompt_tokens=reply.counted.prompt_tokens,
        )

    async def choose(self, prompt: Prompt, choices: tuple[str, str]) -> Preference:
        """See `Engine.choose`; from the log-probabilities of the first token, or without them from the generated word.

        The score is None if the model reasons first, or if neither word can come next.

        Raises:
            Refused: As `write`.
            UserError: As `write`.
            MoteError: As `write`.
        """
        reply = await self._ask(prompt, max_tokens=4, logprobs=True, top_logprobs=20)
        choice = reply.choices[0]
        if choice.message.reasons_first:
            return Preference(None, reply.counted.completion_tokens, reply.counted.prompt_tokens)
        mass = [0.0, 0.0]
        if choice.logprobs and choice.logprobs.content:
            for candidate in choice.logprobs.content[0].top_logprobs:
                word = candidate.token.strip().lower()
                for i, name in enumerate(choices):
                    if word and name.lower().startswith(word):
                        mass[i] += math.exp(candidate.logprob)
        text = _text(choice).lower()
        score: float | None = next((1.0 - i for i, name in enumerate(choices) if text.startswith(name.lower())), None)
        if sum(mass) > 0:
            score = mass[0] / sum(mass)
        return Preference(score, reply.counted.completion_tokens, reply.counted.prompt_tokens)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _ask(self, prompt: Prompt, **extra: Any) -> Reply:
        body = {
            "model": self.name,
            "messages": [{"role": message.role, "content": message.content} for message in prompt.messages],
            "temperature": prompt.temperature,
            "top_p": prompt.top_p,
            "seed": prompt.seed % 2**31,  # some servers hold it in 32 bits
            **({"frequency_penalty": prompt.frequency_penalty} if prompt.frequency_penalty else {}),
            **extra,
        }
        async with self._slots:
            return await self._until_answered(body)

    async def _until_answered(self, body: dict[str, Any]) -> Reply:
        clock = asyncio.get_running_loop().time
        first_asked, waits, reason = clock(), 0, ""
        failed: list[Endpoint] = []
        while len(failed) <= self._retries and (endpoint := await self._endpoints.take(failed)):
            began = clock()
            try:
                reply = await self._attempt(endpoint, body)
            except _Stumble as stumble:
                reason, busy = stumble.reason, stumble.busy
                wait = backoff(waits) if stumble.wait is None else stumble.wait
            else:
                self._endpoints.answered(endpoint)
                return reply
            finally:
                self._endpoints.give_back(endpoint)
            if busy:
                waits += 1
                if clock() + wait > first_asked + self._timeout:
                    break
                self._endpoints.busy(endpoint, wait)
            else:
                self._endpoints.failed(endpoint, began, reason)
                await asyncio.sleep(backoff(len(failed)))
                failed.append(endpoint)
        raise MoteError(
            f"engine: {self._endpoints} failed ({reason or self._endpoints.last_reason}); see that the server runs and "
            f"serves '{self.name}', then run the same command again: finished rows are kept"
        )

    async def _attempt(self, endpoint: Endpoint, body: dict[str, Any]) -> Reply:
        """One request. `post` rather than `chat.completions.create`, which walks every message by its type."""
        try:
            async with asyncio.timeout(self._timeout):  # the client's own is between two bytes
                raw = await self._clients[endpoint.address].post("/chat/completions", cast_to=bytes, body=body)
            return Reply.model_validate_json(raw)
        except APIStatusError as error:
            if not may_pass(error):
                await self._refuse(endpoint, error)
            wait = wait_of(error)
            raise _Stumble(said(error), error.status_code == 429 or wait is not None, wait) from error
        except TimeoutError as error:
            raise _Stumble(f"no answer within {self._timeout:g} s") from error
        except (APIConnectionError, ClientError) as error:
            raise _Stumble(_cause(error)) from error
        except ValidationError as error:
            raise _Stumble("its reply is no chat completion") from error

    async def _refuse(self, endpoint: Endpoint, error: APIStatusError) -> NoReturn:
        """One line that says what is wrong with the request."""
        where = f"engine: {endpoint.address}"
        if error.status_code in (401, 403):
            raise UserError(f"{where} refuses the key ({said(error)}); set OPENAI_API_KEY to one it takes") from error
        if error.status_code == 404:
            try:
                served = [model.id async for model in self._clients[endpoint.address].models.list()]
            except (OpenAIError, ClientError, ValueError) as missing:
                raise UserError(f"{where} is not there ({said(error)}); give the address that ends in /v1") from missing
            names = ", ".join(f"'{name}'" for name in served)
            raise UserError(f"{where} does not serve model='{self.name}' ({said(error)}); it serves {names}") from error
        if error.status_code not in OF_ONE_REQUEST:
            raise UserError(
                f"{where} refuses to work ({said(error)}); mend that, then run the same command again: finished rows "
                "are kept"
            ) from error
        raise Refused(
            f"{where} refuses a request ({said(error)}); where it is too long for the server, fewer chains.examples, a "
            "lower chains.max_tokens and shorter questions (chains.max_question_chars) help"
        ) from error


def _text(choice: Choice) -> str:
    return (choice.message.content or "").strip()


def _cause(error: Exception) -> str:
    """What the client's general error was made from."""
    cause = error.__cause__ or error
    return " ".join(str(cause).split()) or type(cause).__name__
