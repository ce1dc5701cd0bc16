"""POST /v1/chat/completions: read the size-limited body, parse it, queue the generations, send the answers."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from functools import cached_property

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mote.core.records import Answer
from mote.inference.events import Token, Verdict
from mote.inference.model import Model
from mote.serve.answer_stream import AnswerStream
from mote.serve.api_error import ApiError
from mote.serve.chat_request import ChatRequest, parse_request
from mote.serve.jobs import Job, Jobs
from mote.serve.metrics import Metrics
from mote.serve.openai_schema import (
    CheckedTokens,
    CheckResult,
    Choice,
    Chunk,
    ChunkChoice,
    Completion,
    Delta,
    Details,
    Message,
    StepEvent,
    StepTokens,
    Usage,
)

_CLIENT_LEFT = 499  # counted in the metrics; nobody receives it
_DRAIN = 30.0  # seconds beyond the time limit for a slow client to drain the response


async def complete(request: Request, jobs: Jobs, metrics: Metrics) -> Response:
    """Parse a request for answers and queue them.

    Raises:
        ApiError: The request is refused.
    """
    data = await _body(request, jobs.settings.max_request_bytes, jobs.settings.timeout)
    chat = parse_request(data, jobs.settings, jobs.model.modes)
    try:
        job = await jobs.begin(chat)
    except ApiError as error:
        metrics.requests.labels(chat.mode, error.status).inc()
        raise
    return CompletionResponse(jobs, job, chat, metrics)


async def _body(request: Request, limit: int, timeout: float) -> bytes:
    """The body of a request, of at most `limit` bytes."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the request must have the content type application/json")
    too_long = ApiError(413, f"the request has more than {limit} bytes", headers={"Connection": "close"})
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limit:
        raise too_long
    data = bytearray()
    try:
        async with asyncio.timeout(timeout):
            async for part in request.stream():
                data += part
                if len(data) > limit:
                    raise too_long
    except TimeoutError as error:
        message = f"the request did not arrive within {timeout:g} s"
        raise ApiError(408, message, headers={"Connection": "close"}) from error
    except ClientDisconnect as error:
        raise ApiError(400, "the request ended early") from error
    return bytes(data)


class AnswerState:
    """One answer of a request while it is generated.

    Args:
        model: Generates it.
        chat: The request.
        index: Index of the answer among those of the request.
    """

    def __init__(self, model: Model, chat: ChatRequest, index: int) -> None:
        self.items: list[Token | Verdict] = []
        self.stream = AnswerStream(model.events(chat.mode), model.scheme.answer, chat.stop, index)
        self._model = model
        self._chat = chat

    @cached_property
    def answer(self) -> Answer:
        """The answer; only read once generation has ended."""
        chat = self._chat
        answer = self._model.read(chat.question, self.items, chat.mode, chat.limits)
        return answer.model_copy(update={"finish": "stop"}) if self.stream.stopped else answer

    @property
    def tokens(self) -> CheckedTokens | StepTokens:
        """Token counts of the answer, with its checks if it was self-checked."""
        answer = self.answer
        if answer.safe is None:
            return StepTokens(mode=answer.mode, steps=answer.tokens.steps)
        checks = [CheckResult(depth=check.depth, safe=check.safe, score=check.score) for check in answer.checks]
        return CheckedTokens(
            mode=answer.mode, steps=answer.tokens.steps, safe=answer.safe, checks=checks, dropped=answer.tokens.dropped
        )


class CompletionResponse(Response):
    """Sends the answers of a job to the client, whole or streamed; ends the job when the client disconnects."""

    def __init__(self, jobs: Jobs, job: Job, chat: ChatRequest, metrics: Metrics) -> None:
        super().__init__()
        self._jobs = jobs
        self._job = job
        self._chat = chat
        self._metrics = metrics
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._states = [AnswerState(jobs.model, chat, index) for index in range(chat.n)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response (ASGI)."""
        began = time.monotonic()
        status = _CLIENT_LEFT
        sending = asyncio.create_task(self._stream(send) if self._chat.stream else self._whole(send))
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            limit = self._jobs.settings.timeout + _DRAIN
            await asyncio.wait({sending, leaving}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                status = sending.result()
        finally:
            self._jobs.end(self._job)
            sending.cancel()
            leaving.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            self._count(status, time.monotonic() - began)

    async def _whole(self, send: Send) -> int:
        messages = [Message(content="") for _ in self._states]
        reasoning = ["" for _ in self._states]
        try:
            async for choice in self._choices():
                messages[choice.index].content += choice.delta.content or ""
                reasoning[choice.index] += choice.delta.reasoning_content or ""
        except ApiError as error:
            await _send(send, error.response())
            return error.status
        for message, text in zip(messages, reasoning, strict=True):
            if text and self._chat.include_reasoning:
                message.reasoning_content = text
        choices = [
            Choice(index=index, message=message, finish_reason=state.answer.finish, mote=state.tokens)
            for index, (message, state) in enumerate(zip(messages, self._states, strict=True))
        ]
        body = Completion(
            id=self._id, created=self._created, model=self._chat.model, choices=choices, usage=self._usage()
        )
        await _send(send, Response(body.model_dump_json(), media_type="application/json"))
        return 200

    async def _stream(self, send: Send) -> int:
        """Send server-sent events; errors before the first of them still get an HTTP status."""
        begun = False

        async def event(data: str, more: bool = True) -> None:
            nonlocal begun
            if not begun:
                headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                begun = True
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": more})

        try:
            async for choice in self._choices():
                if not begun:
                    for index in range(self._chat.n):
                        first = Delta(role="assistant", content="")
                        await event(self._chunk(ChunkChoice(index=index, delta=first, finish_reason=None)))
                if (sent := self._sent(choice)) is not None:
                    await event(self._chunk(sent))
        except ApiError as error:
            if not begun:
                await _send(send, error.response())
                return error.status
            await event(bytes(error.response().body).decode(), more=False)
            return error.status
        if self._chat.include_usage:
            await event(self._chunk(usage=self._usage()))
        await event("[DONE]", more=False)
        return 200

    async def _choices(self) -> AsyncIterator[ChunkChoice]:
        """Choices of all answers in the order they are generated; each answer's last has the event `done`."""
        began = time.monotonic()
        waiting = True
        async for index, item in self._job.tokens():
            if waiting:
                self._metrics.first_token.observe(time.monotonic() - began)
                waiting = False
            state = self._states[index]
            if item is None:
                for choice in state.stream.end():
                    yield choice
            elif not state.stream.stopped:
                state.items.append(item)
                for choice in state.stream.token(item):
                    yield choice
                if state.stream.stopped:
                    self._job.stop(index)

    def _sent(self, choice: ChunkChoice) -> ChunkChoice | None:
        """The choice as it is sent; None for reasoning that the request left out."""
        assert isinstance(choice.mote, StepEvent)
        if choice.mote.event == "done":
            state = self._states[choice.index]
            finish = state.answer.finish
            return ChunkChoice(index=choice.index, delta=Delta(), finish_reason=finish, mote=state.tokens)
        return choice if choice.mote.answer or self._chat.include_reasoning else None

    def _chunk(self, *choices: ChunkChoice, usage: Usage | None = None) -> str:
        chunk = Chunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._chat.model,
            choices=list(choices),
        )
        if usage is not None:
            chunk.usage = usage
        return chunk.model_dump_json(exclude_unset=True)

    def _usage(self) -> Usage:
        counts = [state.answer.tokens for state in self._states]
        generated = sum(tokens.total for tokens in counts)
        reasoning = generated - sum(tokens.steps.get(self._jobs.model.scheme.answer, 0) for tokens in counts)
        return Usage(
            prompt_tokens=self._job.prompt_tokens,
            completion_tokens=generated,
            total_tokens=self._job.prompt_tokens + generated,
            completion_tokens_details=Details(reasoning_tokens=reasoning),
        )

    def _count(self, status: int, seconds: float) -> None:
        mode = self._chat.mode
        self._metrics.requests.labels(mode, status).inc()
        self._metrics.seconds.observe(seconds)
        self._metrics.prompt_tokens.inc(self._job.prompt_tokens)
        for state in self._states:
            counts = state.answer.tokens
            dropped = {"dropped": counts.dropped} if counts.dropped else {}
            for step, tokens in (counts.steps | dropped).items():
                self._metrics.tokens.labels(mode, step).inc(tokens)


async def _disconnected(receive: Receive) -> None:
    """Wait until the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send(send: Send, response: Response) -> None:
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body})
