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
from mote.inference.engines.endpoints import LOADING_WAIT, Endpoint, Endpoints, backoff
from mote.inference.engines.replies import (
    REQUEST_ERRORS,
    Choice,
    Reply,
    error_text,
    is_loading,
    is_transient,
    retry_after,
)

_CONNECT = 30.0  # seconds until a machine that is off counts as such


class _TransientError(Exception):
    """A failed attempt that may succeed when it is repeated.

    Attributes:
        reason: What happened.
        busy: The server is up and asks to wait.
        wait: Seconds it asks for, if it says.
    """

    def __init__(self, reason: str, busy: bool = False, wait: float | None = None) -> None:
        self.reason = reason
        self.busy = busy
        self.wait = wait


class ServerEngine:
    """A model behind one or several addresses such as `http://localhost:8000/v1`.

    Requests go to the least busy address that responds. An address that fails three times in a row is set aside and
    tried again later; its requests move to another one. The API key is read from `OPENAI_API_KEY`.

    Args:
        addresses: Comma-separated /v1 addresses, as in a recipe; all serve the same model.
        model: Name the model is served under.
        concurrency: Maximum number of requests in flight, over all addresses.
        retries: How often a failed request is repeated: after 5xx, a broken connection, a timeout, or a reply that is
            no chat completion. A server that is busy (429, or any error with Retry-After) or still loads its model does
            not use retries up; the request waits until `timeout`.
        timeout: Seconds one attempt may take.
    """

    def __init__(
        self, addresses: str, model: str, concurrency: int = 256, retries: int = 5, timeout: float = 600.0
    ) -> None:
        self.name = model
        self._retries = retries
        self._timeout = timeout
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
        """See `Engine.write`; without token counts from the server, `tokens` is 0 and `prompt_tokens` None.

        Raises:
            Refused: The server refuses this request (400, 413, 422); it is not repeated.
            UserError: The server refuses the key, the model or the like (401, 404, ...).
            MoteError: No server gave a valid response after all retries.
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
            "seed": prompt.seed % 2**31,  # some servers store it in 32 bits
            **({"frequency_penalty": prompt.frequency_penalty} if prompt.frequency_penalty else {}),
            **extra,
        }
        async with self._slots:
            return await self._until_answered(body)

    async def _until_answered(self, body: dict[str, Any]) -> Reply:
        clock = asyncio.get_running_loop().time
        first_asked = clock()
        waits = 0
        reason = ""
        failed: list[Endpoint] = []
        while len(failed) <= self._retries and (endpoint := await self._endpoints.take(failed)):
            began = clock()
            try:
                reply = await self._attempt(endpoint, body)
            except _TransientError as transient:
                reason = transient.reason
                busy = transient.busy
                wait = backoff(waits) if transient.wait is None else transient.wait
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
        """One request; `post` is faster than `chat.completions.create`, which converts every message by its type."""
        try:
            async with asyncio.timeout(self._timeout):  # the client's own timeout is between two bytes
                raw = await self._clients[endpoint.address].post("/chat/completions", cast_to=bytes, body=body)
            return Reply.model_validate_json(raw)
        except APIStatusError as error:
            if not is_transient(error):
                await self._refuse(endpoint, error)
            wait = retry_after(error)
            if is_loading(error):
                self._endpoints.loading(endpoint, error_text(error))
                raise _TransientError(error_text(error), True, LOADING_WAIT if wait is None else wait) from error
            raise _TransientError(error_text(error), error.status_code == 429 or wait is not None, wait) from error
        except TimeoutError as error:
            raise _TransientError(f"no answer within {self._timeout:g} s") from error
        except (APIConnectionError, ClientError) as error:
            raise _TransientError(_cause(error)) from error
        except ValidationError as error:
            raise _TransientError("its reply is no chat completion") from error

    async def _refuse(self, endpoint: Endpoint, error: APIStatusError) -> NoReturn:
        """Raise the one-line error of a refused request."""
        where = f"engine: {endpoint.address}"
        reason = error_text(error)
        if error.status_code in (401, 403):
            raise UserError(f"{where} refuses the key ({reason}); set OPENAI_API_KEY to a valid one") from error
        if error.status_code == 404:
            try:
                served = [model.id async for model in self._clients[endpoint.address].models.list()]
            except (OpenAIError, ClientError, ValueError) as missing:
                raise UserError(f"{where} is no OpenAI API ({reason}); give the address ending in /v1") from missing
            names = ", ".join(f"'{name}'" for name in served)
            raise UserError(f"{where} does not serve model='{self.name}' ({reason}); it serves {names}") from error
        if error.status_code not in REQUEST_ERRORS:
            raise UserError(
                f"{where} refuses to work ({reason}); fix that, then run the same command again: finished rows are kept"
            ) from error
        raise Refused(
            f"{where} refuses a request ({reason}); if it is too long for the server, fewer chains.examples, "
            "a lower chains.max_tokens and shorter questions (chains.max_question_chars) help"
        ) from error


def _text(choice: Choice) -> str:
    return (choice.message.content or "").strip()


def _cause(error: Exception) -> str:
    """The cause of the client's generic error, on one line."""
    cause = error.__cause__ or error
    return " ".join(str(cause).split()) or type(cause).__name__
