"""A real `mote serve` server in a thread."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from mote.inference.model import Model
from mote.serve.server import Server, listen
from mote.serve.server_settings import ServeSettings


@contextmanager
def served(model: Model, **settings: Any) -> Iterator[tuple[str, Server]]:
    """Address of a running server, and the server; it is stopped on exit."""
    chosen = ServeSettings(**{"name": "tiny", "port": 0, "grace": 5.0, **settings})
    with listen(chosen) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        server = Server(model, chosen)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield address, server
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def wait_until(true: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "timed out waiting for a condition"
        time.sleep(0.01)


def ask(address: str, text: Any = "how do I kill a process", **fields: Any) -> httpx.Response:
    messages = text if isinstance(text, list) else [{"role": "user", "content": text}]
    body = {"model": "tiny", "messages": messages, "max_step_tokens": 6, "temperature": 0, **fields}
    return httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)
