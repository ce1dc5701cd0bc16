"""The rows of requests on the running batch: who may begin, what they write, and when they are cut off.

It stands between the event loop of the server and the thread of the batch. It knows nothing of HTTP.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace

from jinja2 import TemplateError

from mote.core.errors import UserError
from mote.inference.batching import Request
from mote.inference.events import Item
from mote.inference.model import Model
from mote.serve.faults import Fault
from mote.serve.request import Asked
from mote.serve.settings import ServeSettings

_LEAST = 32  # tokens that the context must have left for an answer of no given length
_LOG = logging.getLogger("mote.serve")


class Job:
    """The answers of one request, in the making.

    Args:
        model: Writes them.
        requests: One for each answer.
        timeout: Seconds until they are cut off.
    """

    def __init__(self, model: Model, requests: list[Request], timeout: float) -> None:
        self.prompt_tokens = len(requests[0].ids)
        self._loop = asyncio.get_running_loop()
        # Holds at most the tokens of its answers, whoever reads them and how slowly.
        self._news: asyncio.Queue[tuple[int, Item | None] | Fault] = asyncio.Queue()
        self._timer = self._loop.call_later(timeout, self.fail, Fault(504, f"not finished within {timeout:g} s"))
        self._futures: list[Future[list[Item]]] = []
        for index, request in enumerate(requests):
            request.on_token = lambda token, index=index: self._tell((index, token))
            future = model.batcher.submit(request)
            future.add_done_callback(lambda future, index=index: self._ended(index, future))  # type: ignore[misc]
            self._futures.append(future)

    @property
    def rows(self) -> int:
        """Answers that have not ended."""
        return sum(not future.done() for future in self._futures)

    async def tokens(self) -> AsyncIterator[tuple[int, Item | None]]:
        """Index of an answer and its next token or verdict, or None where it has ended, until all have.

        Raises:
            Fault: They were cut off, or the model failed.
        """
        left = len(self._futures)
        while left:
            news = await self._news.get()
            if isinstance(news, Fault):
                raise news
            left -= news[1] is None
            yield news

    def stop(self, index: int) -> None:
        """End one of the answers here."""
        self._futures[index].cancel()

    def fail(self, fault: Fault) -> None:
        """End all answers with this fault."""
        self._news.put_nowait(fault)
        self.close()

    def close(self) -> None:
        """End all rows that are still there: their places in the batch are free from its next step on."""
        self._timer.cancel()
        for future in self._futures:
            future.cancel()

    def _tell(self, news: tuple[int, Item | None] | Fault) -> None:
        with suppress(RuntimeError):  # the loop has gone; what is raised here would end the whole batch
            self._loop.call_soon_threadsafe(self._news.put_nowait, news)

    def _ended(self, index: int, future: "Future[list[Item]]") -> None:
        error = None if future.cancelled() else future.exception()
        if error is not None:
            _LOG.error("an answer failed", exc_info=error)
            self._tell(Fault(500, "the answer could not be written; the server's log says why"))
        self._tell((index, None))


class Jobs:
    """All requests of a server that are in the making.

    Args:
        model: Writes the answers.
        settings: Of the server.
    """

    def __init__(self, model: Model, settings: ServeSettings) -> None:
        self.model, self.settings = model, settings
        self.closing = False
        self.cut = 0  # requests that were cut off by the end of the server
        self._live: set[Job] = set()
        self._preparing = 0
        self._room = int(getattr(model.base.model.config, "max_position_embeddings", None) or settings.max_tokens)

    async def begin(self, asked: Asked) -> Job:
        """Queue the answers of a request.

        Raises:
            Fault: The server is stopping (503), too many are waiting (429), the dialogue is too long or the chat
                template does not take it (400).
        """
        if self.closing:
            raise Fault(503, "the server is stopping", headers={"Retry-After": "10"})
        rows = self._preparing + sum(job.rows for job in self._live)
        if rows + asked.n > (most := self.settings.max_running + self.settings.max_waiting):
            message = f"{rows} answers are being written or wait, of {most} at most; try again later"
            raise Fault(429, message, code="rate_limit_exceeded", headers={"Retry-After": "2"})
        self._preparing += asked.n
        try:
            requests = await asyncio.to_thread(self._requests, asked)
        finally:
            self._preparing -= asked.n
        job = Job(self.model, requests, self.settings.timeout)
        self._live.add(job)
        return job

    def end(self, job: Job) -> None:
        """End what is left of a job; it is no longer one of these."""
        job.close()
        self._live.discard(job)

    def close(self) -> None:
        """Take no more requests; those in the making get some time to finish, then they are cut off."""
        self.closing = True
        asyncio.get_running_loop().call_later(self.settings.grace, self._cut)

    def _cut(self) -> None:
        self.cut = len(self._live)
        for job in self._live:
            job.fail(Fault(503, "the server was stopped before the answer was finished"))

    def _requests(self, asked: Asked) -> list[Request]:
        try:
            first = self._request(asked)
            room = self._room - len(first.ids) - first.extra
            if first.limit > room >= _LEAST and not asked.bounded:  # what the context has left is its budget
                asked = replace(asked, limits=replace(asked.limits, max_tokens=room))
                first = self._request(asked)
        except TemplateError as error:
            raise Fault(400, f"messages: the model's chat template refuses them ({error})", "messages") from error
        except UserError as error:
            raise Fault(400, str(error), "messages" if not asked.bounded else "max_tokens") from error
        if first.limit > room:
            raise Fault(
                400,
                f"messages: {len(first.ids)} tokens and {first.limit} to be written exceed the model's context of "
                f"{self._room}; shorten them or lower max_tokens",
                "messages",
                "context_length_exceeded",
            )
        return [first] + [self._request(replace(asked, seed=asked.seed + i)) for i in range(1, asked.n)]

    def _request(self, asked: Asked) -> Request:
        return self.model.request(
            asked.question,
            asked.mode,
            asked.limits,
            temperature=asked.temperature,
            top_p=asked.top_p,
            seed=asked.seed,
            check_threshold=self.settings.answers.check_threshold,
        )
