"""A request's answers on their way to the client, whole or as they are written."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mote.core.records import Answer
from mote.inference.events import Event, Item
from mote.inference.model import Model
from mote.serve.deltas import Delta, Deltas
from mote.serve.faults import Fault
from mote.serve.jobs import Job, Jobs
from mote.serve.metrics import Metrics
from mote.serve.request import Asked
from mote.serve.schema import (
    CheckedTokens,
    CheckTold,
    Choice,
    Chunk,
    ChunkChoice,
    Completion,
    Details,
    Happening,
    Message,
    Piece,
    StepTokens,
    Usage,
)

_GONE = 499  # the client left; nobody gets this status, the counters show it
_SPARE = 30.0  # seconds beyond the time limit that a slow client has to take what was written


class _Told:
    """One of the answers of a request, as far as it is written."""

    def __init__(self, model: Model, asked: Asked) -> None:
        self.items: list[Item] = []
        self.deltas = Deltas(model.events(asked.mode), model.scheme.answer, asked.stop)
        self._model, self._asked = model, asked

    @property
    def answer(self) -> Answer:
        """What is written."""
        asked = self._asked
        answer = self._model.read(asked.question, self.items, asked.mode, asked.limits)
        return answer.model_copy(update={"finish": "stop"}) if self.deltas.stopped else answer


class Answering(Response):
    """Writes the answers of a job to the client; ends the job as soon as the client has left."""

    def __init__(self, jobs: Jobs, job: Job, asked: Asked, metrics: Metrics) -> None:
        super().__init__()
        self._jobs, self._job, self._asked, self._metrics = jobs, job, asked, metrics
        self._id, self._created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self._told = [_Told(jobs.model, asked) for _ in range(asked.n)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; see the class."""
        began, status = time.monotonic(), _GONE
        answering = asyncio.create_task(self._stream(send) if self._asked.stream else self._whole(send))
        leaving = asyncio.create_task(_left(receive))
        try:
            limit = self._jobs.settings.timeout + _SPARE
            await asyncio.wait({answering, leaving}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                status = answering.result()
        finally:
            self._jobs.end(self._job)
            answering.cancel()
            leaving.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)
            self._count(status, time.monotonic() - began)

    async def _whole(self, send: Send) -> int:
        texts = [Message(content="") for _ in self._told]
        reasoning = ["" for _ in self._told]
        try:
            async for index, delta in self._deltas():
                texts[index].content += delta.content
                reasoning[index] += delta.reasoning
        except Fault as fault:
            await _send(send, fault.response())
            return fault.status
        for message, text in zip(texts, reasoning, strict=True):
            if text and self._asked.include_reasoning:
                message.reasoning_content = text
        choices = [
            Choice(index=i, message=message, finish_reason=answer.finish, mote=_tokens(answer))
            for i, (message, answer) in enumerate(zip(texts, (told.answer for told in self._told), strict=True))
        ]
        body = Completion(
            id=self._id, created=self._created, model=self._asked.model, choices=choices, usage=self._usage()
        )
        await _send(send, Response(body.model_dump_json(), media_type="application/json"))
        return 200

    async def _stream(self, send: Send) -> int:
        """Server-sent events; until the first of them, errors still have a status of their own."""
        begun = False

        async def event(data: str, more: bool = True) -> None:
            nonlocal begun
            if not begun:
                headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                begun = True
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": more})

        try:
            async for index, delta in self._deltas():
                if not begun:
                    for i in range(self._asked.n):
                        first = Piece(role="assistant", content="")
                        await event(self._chunk(ChunkChoice(index=i, delta=first, finish_reason=None)))
                if (choice := self._choice(index, delta)) is not None:
                    await event(self._chunk(choice))
        except Fault as fault:
            if not begun:
                await _send(send, fault.response())
                return fault.status
            await event(_json(fault), more=False)
            return fault.status
        if self._asked.include_usage:
            await event(self._chunk(usage=self._usage()))
        await event("[DONE]", more=False)
        return 200

    async def _deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """Pieces of all answers as they come; each answer's last one is `done`."""
        began = time.monotonic()
        waiting = True
        async for index, item in self._job.tokens():
            if waiting:
                self._metrics.first_token.observe(time.monotonic() - began)
                waiting = False
            told = self._told[index]
            if item is None:
                for delta in told.deltas.end():
                    yield index, delta
            elif not told.deltas.stopped:
                told.items.append(item)
                for delta in told.deltas.token(item):
                    yield index, delta
                if told.deltas.stopped:
                    self._job.stop(index)

    def _choice(self, index: int, delta: Delta) -> ChunkChoice | None:
        """What a piece sends; None where it is of the reasoning and nobody wants that."""
        event, answer = delta.event, self._jobs.model.scheme.answer
        if event.kind == "done":
            whole = self._told[index].answer
            return ChunkChoice(index=index, delta=Piece(), finish_reason=whole.finish, mote=_tokens(whole))
        if event.step != answer and not self._asked.include_reasoning:
            return None
        happening = Happening(
            event=event.kind, step=event.step, answer=event.step == answer, tokens=event.tokens, **_checking(event)
        )
        piece = Piece()
        if delta.content:
            piece = Piece(content=delta.content)
        elif delta.reasoning:
            piece = Piece(reasoning_content=delta.reasoning)
        return ChunkChoice(index=index, delta=piece, finish_reason=None, mote=happening)

    def _chunk(self, *choices: ChunkChoice, usage: Usage | None = None) -> str:
        chunk = Chunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._asked.model,
            choices=list(choices),
        )
        if usage is not None:
            chunk.usage = usage
        return chunk.model_dump_json(exclude_unset=True)

    def _usage(self) -> Usage:
        answers = [told.answer.tokens for told in self._told]
        written = sum(tokens.total for tokens in answers)
        reasoning = written - sum(tokens.steps.get(self._jobs.model.scheme.answer, 0) for tokens in answers)
        return Usage(
            prompt_tokens=self._job.prompt_tokens,
            completion_tokens=written,
            total_tokens=self._job.prompt_tokens + written,
            completion_tokens_details=Details(reasoning_tokens=reasoning),
        )

    def _count(self, status: int, seconds: float) -> None:
        mode = self._asked.mode
        self._metrics.requests.labels(mode, status).inc()
        self._metrics.seconds.observe(seconds)
        self._metrics.prompt_tokens.inc(self._job.prompt_tokens)
        for told in self._told:
            written = told.answer.tokens
            for step, tokens in [*written.steps.items(), *([("dropped", written.dropped)] if written.dropped else [])]:
                self._metrics.tokens.labels(mode, step).inc(tokens)


def _tokens(answer: Answer) -> CheckedTokens | StepTokens:
    if answer.safe is None:
        return StepTokens(mode=answer.mode, steps=answer.tokens.steps)
    checks = [CheckTold(depth=check.depth, safe=check.safe, score=check.score) for check in answer.checks]
    return CheckedTokens(
        mode=answer.mode, steps=answer.tokens.steps, safe=answer.safe, checks=checks, dropped=answer.tokens.dropped
    )


def _checking(event: Event) -> dict[str, Any]:
    """What only the events of a check have."""
    if event.kind == "check":
        return {"verdict": event.text, "safe": event.safe, "score": event.score}
    return {"deeper": event.text} if event.kind == "again" else {}


async def _left(receive: Receive) -> None:
    """Wait until the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send(send: Send, response: Response) -> None:
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body})


def _json(fault: Fault) -> str:
    return bytes(fault.response().body).decode()
