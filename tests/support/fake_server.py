"""A fake OpenAI-compatible server with scripted failures, over real HTTP.

python tests/support/fake_server.py PORT        # answers every request until it is killed: for benchmarks/server.py
"""

import asyncio
import json
import socket
import struct
import sys
import threading
from collections import deque
from types import TracebackType
from typing import Any

TOP = [{"token": "safe", "logprob": -0.1, "bytes": None}, {"token": " uns", "logprob": -2.0, "bytes": None}]


class FakeServer:
    """A server that runs in its own thread.

    Each chat request gets the next behaviour in `plan`, or `usual` when that is empty. Behaviours: `ok`; `length` (a
    truncated answer); `wait` (answers after `release`); a status such as `503`, or `429 0.1` with Retry-After;
    `loading` (as llama.cpp while it loads its model); `reset` (half the body, then a connection reset); `truncated`
    (half the body, then EOF); `garbage` (not HTTP); `not json`; `html`; `text` (JSON with another content type); `no
    choices`; `no usage`; `no logprobs`; `null` (content null).

    Attributes:
        longest: Maximum characters of a chat, longer ones get 400; None for no limit.
        remembers: Whether request bodies are kept in `seen`; off for long runs.
        refused: Number of requests that were too long.
        seen: Bodies of the accepted chat requests in order of arrival.
        keys: Their Authorization headers.
        most_in_flight: Maximum number of concurrent chat requests.
    """

    def __init__(self, usual: str = "ok", port: int = 0, models: tuple[str, ...] | None = ("some-model",)) -> None:
        self.plan: deque[str] = deque()
        self.usual = usual
        self.port = port
        self.models = models
        self.longest: int | None = None
        self.remembers = True
        self.refused = 0
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.in_flight = self.most_in_flight = 0
        self._connections: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._released = asyncio.Event()
        self._server: asyncio.Server | None = None
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> "FakeServer":
        self.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.die()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def start(self) -> None:
        """Listen; after `die`, on the same port as before."""

        async def listen() -> None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

        asyncio.run_coroutine_threadsafe(listen(), self._loop).result()

    def die(self) -> None:
        """Close the port and reset every connection."""

        async def close() -> None:
            assert self._server is not None
            self._server.close()
            for writer in list(self._connections):
                _reset(writer)

        asyncio.run_coroutine_threadsafe(close(), self._loop).result()

    def release(self) -> None:
        """Answer the waiting requests, and later ones at once."""
        self._loop.call_soon_threadsafe(self._released.set)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            while request := await _read(reader):
                head, body = request
                await self._respond(head, body, writer)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._connections.discard(writer)
            writer.close()

    async def _respond(self, head: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        path = head.split(" ")[1]
        if path == "/v1/models" and self.models is not None:
            rows = [{"id": name, "object": "model", "created": 0, "owned_by": "me"} for name in self.models]
            writer.write(_http(200, {"object": "list", "data": rows}))
        elif path == "/v1/chat/completions":
            asked = json.loads(body)
            if self.longest is not None and sum(len(one["content"]) for one in asked["messages"]) > self.longest:
                self.refused += 1
                writer.write(_http(400, {"error": {"message": f"more than {self.longest} characters"}}))
                return
            if self.remembers:
                self.seen.append(asked)
            self.keys += [line[15:] for line in head.splitlines() if line.lower().startswith("authorization:")]
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            try:
                await self._behave(self.plan.popleft() if self.plan else self.usual, asked, writer)
            finally:
                self.in_flight -= 1
        else:
            writer.write(_http(404, {"detail": "Not Found"}))

    async def _behave(self, how: str, asked: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        answer = completion(asked, how)
        status, _, after = how.partition(" ")
        if how == "wait":
            await self._released.wait()
        if how == "loading":
            error = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}
            writer.write(_http(503, error))
        elif status.isdigit():
            error = {"error": {"message": f"behaves\nas {status}", "type": "x", "param": None, "code": int(status)}}
            writer.write(_http(int(status), error, **({"Retry-After": after} if after else {})))
        elif how in ("reset", "truncated"):
            whole = _http(200, answer)
            writer.write(whole[: len(whole) - 40])
            await writer.drain()
            _reset(writer) if how == "reset" else writer.close()
        elif how == "garbage":
            writer.write(b"\x00\x01 no HTTP at all\r\n\r\n")
            writer.close()
        elif how == "not json":
            writer.write(_http(200, b'{"choices": [', "application/json"))
        elif how == "html":
            writer.write(_http(200, b"<html>Please log in</html>", "text/html"))
        elif how == "text":
            writer.write(_http(200, json.dumps(answer).encode(), "text/plain"))
        else:
            writer.write(_http(200, answer))


def completion(asked: dict[str, Any], how: str = "ok") -> dict[str, Any]:
    """Response body that echoes the last message as five tokens."""
    content = [{**TOP[0], "top_logprobs": TOP}]
    message = {"role": "assistant", "content": f" about {asked['messages'][-1]['content']} "}
    if how in ("null", "thinks"):
        message["content"] = None
    if how == "thinks":
        message["reasoning_content"] = "Okay, the answer"
        top = [{"token": "Okay", "logprob": -0.01, "bytes": None}, {"token": " uns", "logprob": -9.0, "bytes": None}]
        content = [{**top[0], "top_logprobs": top}]
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": "length" if how == "length" else "stop",
        "logprobs": {"content": content} if asked.get("logprobs") and how != "no logprobs" else None,
    }
    return {
        "id": "1", "object": "chat.completion", "created": 0, "model": asked["model"],
        "choices": [] if how == "no choices" else [choice],
        "usage": None if how == "no usage" else {"prompt_tokens": 1, "completion_tokens": 5, "total_tokens": 6},
    }  # fmt: skip


async def _read(reader: asyncio.StreamReader) -> tuple[str, bytes] | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
    except asyncio.IncompleteReadError:
        return None
    length = next((int(line[15:]) for line in head.splitlines() if line.lower().startswith("content-length")), 0)
    return head, await reader.readexactly(length)


def _http(status: int, body: Any, kind: str = "application/json", **headers: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} said", f"Content-Type: {kind}", f"Content-Length: {len(data)}"]
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode() + data


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST; unsent data is discarded."""
    if writer.transport.is_closing():
        return
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


if __name__ == "__main__":
    server = FakeServer(port=int(sys.argv[1]))
    server.remembers = False
    server.start()
    threading.Event().wait()
