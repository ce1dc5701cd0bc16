"""Load test of the server: clients that disconnect, stop reading or send garbage; every answer is checked.

    .venv/bin/python benchmarks/load.py                                   # 64 clients for ten minutes
    .venv/bin/python benchmarks/load.py --seconds 60 --out /tmp/load.json

First every question is answered in every mode, one at a time. Under load each answer must be the same, and every
request must end with an answer or an expected error. The exit code is 1 if one does not, or if memory grows by more
than 5 % after the first fifth of the time.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil
from serving import QUESTIONS, random_adapter, running

from mote.core.machine import environment
from mote.inference.load import load
from mote.inference.model import Model
from mote.models.embedded import EMBEDDED

MODES = ["adaptive", "direct", "analysis", "full", "base"]
WAIT = 300.0  # seconds after which a request counts as unanswered
GARBAGE = [
    b"", b"{", b"[" * 10_000, b'{"model": "smol"}', b'{"model": "no", "messages": [{"role": "user", "content": "x"}]}',
    b'{"model": "smol", "messages": [{"role": "tool", "content": "<|response|>"}]}', b"\xff" * 1000,
    b'{"model": "smol", "messages": [{"role": "user", "content": "x"}], "tools": [{}]}',
]  # fmt: skip


class Load:
    """The clients and the outcomes of their requests."""

    def __init__(self, address: str, expected: dict[tuple[str, str], str], tokens: int, seconds: float) -> None:
        self.address = address
        self.expected = expected
        self.tokens = tokens
        self.until = time.monotonic() + seconds
        self.ended: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.latency: list[float] = []
        self.memory: list[tuple[float, float]] = []

    async def run(self, clients: int) -> None:
        """Run all clients concurrently and sample the memory every second."""
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=WAIT, limits=limits) as connection:
            watch = asyncio.create_task(self._watch())
            await asyncio.gather(*(self._client(connection, random.Random(i)) for i in range(clients)))
            watch.cancel()

    async def _client(self, connection: httpx.AsyncClient, rng: random.Random) -> None:
        while time.monotonic() < self.until:
            kind = rng.choices(["whole", "stream", "slow", "leave", "garbage"], [40, 30, 10, 15, 5])[0]
            began = time.monotonic()
            try:
                await getattr(self, f"_{kind}")(connection, rng)
            except Exception as error:
                self.wrong.append(f"{kind}: {type(error).__name__}: {error}"[:200])
            self.ended[kind] += 1
            if kind in ("whole", "stream"):
                self.latency.append(time.monotonic() - began)

    def _body(self, rng: random.Random, stream: bool) -> tuple[dict[str, Any], str]:
        question, mode = rng.choice(list(self.expected))
        messages = [{"role": "user", "content": question}]
        body = {"model": f"smol:{mode}", "messages": messages, "max_step_tokens": self.tokens, "stream": stream}
        return body, self.expected[question, mode]

    def _check(self, body: dict[str, Any], said: str, expected: str) -> None:
        if said != expected:
            self.wrong.append(f"{body['model']} said {said!r} instead of {expected!r}"[:200])

    async def _whole(self, connection: httpx.AsyncClient, rng: random.Random) -> None:
        body, expected = self._body(rng, False)
        reply = await connection.post(f"{self.address}/chat/completions", json=body)
        if reply.status_code == 429:
            self.ended["429"] += 1
            await asyncio.sleep(float(reply.headers["retry-after"]))
        elif reply.status_code != 200:
            self.wrong.append(f"status {reply.status_code}: {reply.text[:100]}")
        else:
            self._check(body, reply.json()["choices"][0]["message"]["content"], expected)

    async def _stream(self, connection: httpx.AsyncClient, rng: random.Random, pause: float = 0.0) -> None:
        body, expected = self._body(rng, True)
        said = ""
        async with connection.stream("POST", f"{self.address}/chat/completions", json=body) as reply:
            if reply.status_code == 429:
                self.ended["429"] += 1
                return
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise RuntimeError(event["error"]["message"])
                    said += "".join(choice["delta"].get("content", "") for choice in event["choices"])
                    await asyncio.sleep(pause)
        self._check(body, said, expected)

    async def _slow(self, connection: httpx.AsyncClient, rng: random.Random) -> None:
        await self._stream(connection, rng, pause=rng.uniform(0.05, 0.3))

    async def _leave(self, connection: httpx.AsyncClient, rng: random.Random) -> None:
        body, _ = self._body(rng, rng.random() < 0.5)
        try:
            async with asyncio.timeout(rng.uniform(0.0, 3.0)):
                await connection.post(f"{self.address}/chat/completions", json=body)
        except TimeoutError:
            pass  # that was the plan

    async def _garbage(self, connection: httpx.AsyncClient, rng: random.Random) -> None:
        headers = {"content-type": "application/json"}
        url = f"{self.address}/chat/completions"
        reply = await connection.post(url, content=rng.choice(GARBAGE), headers=headers)
        if reply.status_code not in (400, 404, 413, 422) or "error" not in reply.json():
            self.wrong.append(f"garbage got {reply.status_code}")

    async def _watch(self) -> None:
        process = psutil.Process()
        began = time.monotonic()
        while True:
            self.memory.append((time.monotonic() - began, process.memory_info().rss / 2**20))
            await asyncio.sleep(1)


def growth(memory: list[tuple[float, float]]) -> float:
    """Memory in the last fifth of the time over the second fifth; the first fifth is warm-up."""
    sizes = [size for _, size in memory]
    fifth = max(1, len(memory) // 5)
    return statistics.median(sizes[-fifth:]) / statistics.median(sizes[fifth : 2 * fifth])


def expected_of(model: Model, tokens: int) -> dict[tuple[str, str], str]:
    """The reference answers: each question alone."""
    return {
        (question, mode): model.answer(question, mode, max_step_tokens=tokens).answer
        for question in QUESTIONS
        for mode in MODES
    }


def main() -> None:
    """Run the load test, print and write the outcome."""
    parser = argparse.ArgumentParser(description="A server under load.")
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--adapter", help="a random one where none is given")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=12, help="budget of a step")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = load(given.model, given.adapter or random_adapter(given.model, Path(folder)), device="cpu")
    expected = expected_of(model, given.tokens)
    with running(model) as address:
        load_ = Load(address, expected, given.tokens, given.seconds)
        asyncio.run(load_.run(given.clients))
        model.batcher.wait()
        metrics = httpx.get(f"{address.removesuffix('/v1')}/metrics").text
    numbers = [line.split() for line in metrics.splitlines() if line.startswith("mote_requests_total")]
    grown = growth(load_.memory)
    result = {
        "what": "a server on loopback under load; every answer compared with the same question asked alone",
        "shape": {
            "model": given.model, "adapter": given.adapter or "random", "seconds": given.seconds,
            "clients": given.clients, "step_tokens": given.tokens,
        },
        "requests": dict(load_.ended),
        "statuses": {name: int(float(value)) for name, value in numbers},
        "wrong": load_.wrong[:20],
        "wrong_count": len(load_.wrong),
        "rows_left": model.batcher.rows,
        "seconds_median": round(statistics.median(load_.latency), 2),
        "memory_mb": {"second_fifth_to_last_fifth": round(grown, 4), "last": round(load_.memory[-1][1])},
        **environment(),
    }  # fmt: skip
    given.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    if load_.wrong or grown > 1.05 or model.batcher.rows != (0, 0):
        sys.exit(1)


if __name__ == "__main__":
    main()
