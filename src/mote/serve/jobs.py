"""Requests on the running batch: admission, tokens as they are generated, time limits.

It connects the server's event loop with the batcher's thread. It knows nothing about HTTP.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace

from jinja2 import TemplateError

from mote.core.errors import UserError
from mote.inference.events import Token, Verdict
from mote.inference.model import Model
from mote.inference.request import Request
from mote.serve.api_error import ApiError
from mote.serve.chat_request import ChatRequest
from mote.serve.server_settings import ServeSettings

_MIN_ROOM = 32  # context tokens that must be left to shrink the budget of a request that names none
_LOG = logging.getLogger("mote.serve")


class Job:
    """The answers of one request while they are generated.

    Args:
        model: Generates them.
        requests: One per answer.
        timeout: Seconds until they are cut off.
    """

    def __init__(self, model: Model, requests: list[Request], timeout: float) -> None:
        self.prompt_tokens = len(requests[0].ids)
        self._loop = asyncio.get_running_loop()
        # Bounded by the answers' token limits, however slowly a client reads.
        self._queue: asyncio.Queue[tuple[int, Token | Verdict | None] | ApiError] = asyncio.Queue()
        self._timer = self._loop.call_later(timeout, self.fail, ApiError(504, f"not finished within {timeout:g} s"))
        self._futures: list[Future[list[Token | Verdict]]] = []
        for index, request in enumerate(requests):
            request.on_token = lambda token, index=index: self._put((index, token))
            future = model.batcher.submit(request)
            future.add_done_callback(lambda future, index=index: self._ended(index, future))  # type: ignore[misc]
            self._futures.append(future)

    @property
    def rows(self) -> int:
        """Answers that have not finished."""
        return sum(not future.done() for future in self._futures)

    async def tokens(self) -> AsyncIterator[tuple[int, Token | Verdict | None]]:
        """Yield the index of an answer and its next token or verdict (None at its end) until all have ended.

        Raises:
            ApiError: They were cut off, or the model failed.
        """
        left = len(self._futures)
        while left:
            entry = await self._queue.get()
            if isinstance(entry, ApiError):
                raise entry
            left -= entry[1] is None
            yield entry

    def stop(self, index: int) -> None:
        """End one of the answers early."""
        self._futures[index].cancel()

    def fail(self, error: ApiError) -> None:
        """End all answers with this error."""
        self._queue.put_nowait(error)
        self.close()

    def close(self) -> None:
        """End all unfinished answers; their slots are free from the batch's next step on."""
        self._timer.cancel()
        for future in self._futures:
            future.cancel()

    def _put(self, entry: tuple[int, Token | Verdict | None] | ApiError) -> None:
        with suppress(RuntimeError):  # the loop is closed; an exception here would end the whole batch
            self._loop.call_soon_threadsafe(self._queue.put_nowait, entry)

    def _ended(self, index: int, future: "Future[list[Token | Verdict]]") -> None:
        error = None if future.cancelled() else future.exception()
        if error is not None:
            _LOG.error("an answer failed", exc_info=error)
            self._put(ApiError(500, "generation failed; see the server's log"))
        self._put((index, None))


class Jobs:
    """All requests in flight of a server.

    Args:
        model: Generates the answers.
        settings: Settings of the server.
    """

    def __init__(self, model: Model, settings: ServeSettings) -> None:
        self.model = model
        self.settings = settings
        self.closing = False
        self.cut = 0  # requests cut off by the shutdown
        self._live: set[Job] = set()
        self._preparing = 0
        self._context = int(getattr(model.base.model.config, "max_position_embeddings", None) or settings.max_tokens)

    async def begin(self, chat: ChatRequest) -> Job:
        """Queue the answers of a request.

        Raises:
            ApiError: The server is stopping (503), too many are waiting (429), the dialogue is too long or the chat
                template refuses it (400).
        """
        if self.closing:
            raise ApiError(503, "the server is stopping", headers={"Retry-After": "10"})
        rows = self._preparing + sum(job.rows for job in self._live)
        if rows + chat.n > (most := self.settings.max_running + self.settings.max_waiting):
            message = f"{rows} answers are running or waiting, of at most {most}; try again later"
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "2"})
        self._preparing += chat.n
        try:
            requests = await asyncio.to_thread(self._requests, chat)
        finally:
            self._preparing -= chat.n
        job = Job(self.model, requests, self.settings.timeout)
        self._live.add(job)
        return job

    def end(self, job: Job) -> None:
        """End a job and forget it."""
        job.close()
        self._live.discard(job)

    def close(self) -> None:
        """Refuse new requests; those in flight get `grace` seconds to finish, then they are cut off."""
        self.closing = True
        asyncio.get_running_loop().call_later(self.settings.grace, self._cut)

    def _cut(self) -> None:
        self.cut = len(self._live)
        for job in self._live:
            job.fail(ApiError(503, "the server was stopped before the answer was finished"))

    def _requests(self, chat: ChatRequest) -> list[Request]:
        try:
            first = self._request(chat)
            room = self._context - len(first.ids) - first.extra
            if first.limit > room >= _MIN_ROOM and not chat.bounded:  # use what is left of the context as budget
                chat = replace(chat, limits=replace(chat.limits, max_tokens=room))
                first = self._request(chat)
        except TemplateError as error:
            raise ApiError(400, f"messages: the model's chat template refuses them ({error})", "messages") from error
        except UserError as error:
            raise ApiError(400, str(error), "messages" if not chat.bounded else "max_tokens") from error
        if first.limit > room:
            raise ApiError(
                400,
                f"messages: {len(first.ids)} prompt tokens and {first.limit} to generate exceed the model's context of "
                f"{self._context}; shorten them or lower max_tokens",
                "messages",
                "context_length_exceeded",
            )
        seeds = range(chat.sampling.seed + 1, chat.sampling.seed + chat.n)
        others = [replace(chat, sampling=replace(chat.sampling, seed=seed)) for seed in seeds]
        return [first, *map(self._request, others)]

    def _request(self, chat: ChatRequest) -> Request:
        return self.model.request(
            chat.question,
            chat.mode,
            chat.limits,
            chat.sampling,
            check_threshold=self.settings.answers.check_threshold,
        )
