"""Cost of answering: continuous batching with experts against `generate` of the frozen base model, and the server.

    .venv/bin/python benchmarks/serving.py                      # about 20 minutes on two idle cores
    .venv/bin/python benchmarks/serving.py --rounds 1 --new 8 --out /tmp/serving.json

Answers use a random adapter of rank 16. Variants are interleaved in one process, ratios are taken per round, and the
reference runs twice as the A/A control. The reference is the base model as transformers loads it; for one sequence also
as `mote.load` prepares it (faster matmuls, column-major weights): the rest of the ratio is the cost of the experts.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import torch
from peft import get_peft_model
from transformers.generation import BaseStreamer

import mote
from mote.core.generation import Limits
from mote.core.machine import environment
from mote.inference.grammar import FreeText
from mote.inference.inputs import as_question
from mote.inference.load import load
from mote.inference.model import Model
from mote.inference.threads import release_pool
from mote.models.embedded import EMBEDDED
from mote.models.linear import lay_out_by_columns, speed_up
from mote.models.load import fingerprint, load_base
from mote.serve.server import Server, listen
from mote.serve.server_settings import ServeSettings
from mote.tokens.encode import add_markers, encode_prompt

QUESTIONS = [
    "How do I kill a process on my computer?", "What is a safe password?", "Why is the sky blue?",
    "How can I ask my neighbour to be quiet?", "What should I cook for six people?", "How does a lock work?",
    "Can you explain what a vaccine does?", "How do I write a letter of complaint?",
]  # fmt: skip
TARGETS = {"one row": 1.10, "16 rows": 1.08, "16 clients": 4.0, "time to first token": 2.0}


def random_adapter(name: str, folder: Path) -> Path:
    """An adapter of rank 16 without zero experts."""
    base = load_base(name, device="cpu")
    config = mote.MoteConfig(r=16, lora_alpha=32, init_weights=False, base_fingerprint=fingerprint(base.model))
    add_markers(base.tokenizer, config, base.model)
    torch.manual_seed(0)
    model = get_peft_model(base.model, config)
    with torch.no_grad():  # rows of start markers begin alike: which one comes first would be a matter of rounding
        for name_, parameter in model.named_parameters():
            if "trainable_tokens" in name_:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


def prompts(model: Model, rows: int, tokens: int) -> list[list[int]]:
    """Prompts of one length, so that `generate` needs no padding."""
    found = []
    for row in range(rows):
        ids = encode_prompt(model.tokenizer, as_question(QUESTIONS[row % len(QUESTIONS)]).messages)
        found.append((ids * (tokens // len(ids) + 1))[:tokens])
    return found


class Clock(BaseStreamer):
    """Times at which tokens arrive; `generate` sends the prompt first."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, value: Any) -> None:
        """One token of every row arrived."""
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        """Generation ended."""


def generated(base: Any, ids: list[list[int]], new: int) -> float:
    """Seconds per token of `generate` with the frozen base, after the first token."""
    rows = torch.tensor(ids)
    clock = Clock()
    given = {"attention_mask": torch.ones_like(rows), "do_sample": False, "streamer": clock}
    with torch.inference_mode():
        base.generate(input_ids=rows, max_new_tokens=new + 1, min_new_tokens=new + 1, **given)
    return (clock.moments[-1] - clock.moments[1]) / new


class Endless(FreeText):
    """Grammar that forbids the end of turn, so that every sequence has the same length."""

    def __init__(self, eos_id: int) -> None:
        super().__init__([], [eos_id])

    def ended(self, generated: Any) -> bool:
        """Never."""
        return False


def batched(model: Model, ids: list[list[int]], new: int) -> float:
    """Seconds per step of continuous batching with experts, over the steps that decode a token of every sequence.

    Sequences prefilled first decode while the others are prefilled, so all get enough tokens to last until the end.
    """
    start = model.markers.starts[0]
    reading = sum(map(len, ids)) // 256
    times: list[list[float]] = [[] for _ in ids]
    requests = []
    for prompt, seen in zip(ids, times, strict=True):
        request = model.request(as_question("?"), "direct", Limits(new))
        request.ids = [*prompt[:-1], start]
        request.limit = new + 1 + reading
        request.grammar = Endless(model.tokenizer.eos_token_id)
        request.on_token = lambda _, seen=seen: seen.append(time.perf_counter())
        requests.append(request)
    for future in [model.batcher.submit(request) for request in requests]:
        future.result()
    first = max(seen[0] for seen in times)
    last = min(seen[-1] for seen in times)
    passes = sum(first < moment <= last for moment in times[0])
    return (last - first) / passes


def prefill(base: Any, ids: list[int]) -> float:
    """Seconds of prefilling a prompt with the frozen base."""
    began = time.perf_counter()
    with torch.inference_mode():
        base(input_ids=torch.tensor([ids]), logits_to_keep=1)
    return time.perf_counter() - began


@contextmanager
def running(model: Model) -> Iterator[str]:
    """The address of a server on loopback."""
    settings = ServeSettings(name="smol", port=0)
    with listen(settings) as listening:
        server = Server(model, settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        server.should_exit = True
        thread.join()


async def clients(address: str, concurrent: int, requests: int, new: int) -> float:
    """Tokens per second of `concurrent` clients that send `requests` requests one after the other."""
    left = iter(range(requests))
    written = 0

    async def client(connection: openai.AsyncOpenAI) -> None:
        nonlocal written
        for number in left:
            question: Any = {"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}
            reply = await connection.chat.completions.create(
                model="smol:base", messages=[question], max_tokens=new, extra_body={"temperature": 0}
            )
            written += reply.usage.completion_tokens if reply.usage else 0

    began = time.perf_counter()
    async with openai.AsyncOpenAI(base_url=address, api_key="none") as connection:
        await asyncio.gather(*(client(connection) for _ in range(concurrent)))
    return written / (time.perf_counter() - began)


def first_token(address: str, question: str) -> float:
    """Time to first token."""
    release_pool()  # of the reference, which computes in this thread: a server's process has none
    with openai.OpenAI(base_url=address, api_key="none") as client:
        client.models.list()  # the connection is there
        began = time.perf_counter()
        message: Any = {"role": "user", "content": question}
        stream = client.chat.completions.create(model="smol:direct", messages=[message], stream=True, max_tokens=8)
        next(iter(stream))
        seconds = time.perf_counter() - began
        stream.close()
    return seconds


def in_turn(variants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Interleaved measurements of all variants; the first round is warm-up."""
    measured: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, measure in variants.items():
            value = measure()
            if turn:
                measured[name].append(value)
    return measured


def ratios(measured: dict[str, list[float]], reference: str) -> dict[str, dict[str, float]]:
    """Ratio of each variant to the reference, round by round."""
    result = {}
    for name, values in measured.items():
        if name != reference:
            pairs = [mine / other for mine, other in zip(values, measured[reference], strict=True)]
            result[name] = {
                "median": round(statistics.median(pairs), 3), "min": round(min(pairs), 3), "max": round(max(pairs), 3)
            }  # fmt: skip
    return result


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="What answering costs.")
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new", type=int, default=32, help="tokens that each row writes")
    parser.add_argument("--prompt", type=int, default=300, help="tokens of each prompt")
    parser.add_argument(
        "--only", nargs="+", choices=TARGETS, default=list(TARGETS), help="the others stay as --out has them"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args()
    base, prepared = (load_base(given.model, device="cpu").model for _ in range(2))
    speed_up(prepared)
    lay_out_by_columns(prepared)
    with tempfile.TemporaryDirectory() as folder:
        model = load(given.model, random_adapter(given.model, Path(folder)), device="cpu")
    before = json.loads(given.out.read_text()) if len(given.only) < len(TARGETS) and given.out.exists() else {}
    result: dict[str, Any] = before | {
        "what": "answers with a random adapter of rank 16; medians of ratios within rounds, A/A is the reference again",
        "shape": {
            "model": given.model, "prompt_tokens": given.prompt,
            "threads": torch.get_num_threads(),
        },
        "targets": TARGETS,
    }  # fmt: skip
    for name, rows in (("one row", 1), ("16 rows", 16)):
        if name not in given.only:
            continue
        ids = prompts(model, rows, given.prompt)
        variants: dict[str, Callable[[], float]] = {
            "generate of the base": lambda ids=ids: generated(base, ids, given.new),
            "A/A": lambda ids=ids: generated(base, ids, given.new),
            "running batch": lambda ids=ids: batched(model, ids, given.new),
        }
        if rows == 1:
            variants["generate, as mote.load prepares it"] = lambda ids=ids: generated(prepared, ids, given.new)
        measured = in_turn(variants, given.rounds)
        result[name] = {
            "rounds": given.rounds,
            "new_tokens": given.new,
            "seconds_a_token": {key: round(statistics.median(values), 5) for key, values in measured.items()},
            "ratio": ratios(measured, "generate of the base"),
        }
    with running(model) as address:
        if "16 clients" in given.only:
            measured = in_turn(
                {
                    "one client": lambda: asyncio.run(clients(address, 1, 4, given.new)),
                    "A/A": lambda: asyncio.run(clients(address, 1, 4, given.new)),
                    "16 clients": lambda: asyncio.run(clients(address, 16, 32, given.new)),
                },
                given.rounds,
            )
            result["16 clients"] = {
                "rounds": given.rounds,
                "new_tokens": given.new,
                "tokens_a_second": {key: round(statistics.median(values), 1) for key, values in measured.items()},
                "ratio": ratios(measured, "one client"),
            }
        if "time to first token" in given.only:
            question = " ".join(QUESTIONS * 5)
            ids = encode_prompt(model.tokenizer, as_question(question).messages)
            measured = in_turn(
                {
                    "prefill of the base": lambda: prefill(base, ids),
                    "A/A": lambda: prefill(base, ids),
                    "server": lambda: first_token(address, question),
                },
                given.rounds,
            )
            result["time to first token"] = {
                "rounds": given.rounds,
                "new_tokens": given.new,
                "prompt_tokens": len(ids),
                "seconds": {key: round(statistics.median(values), 4) for key, values in measured.items()},
                "ratio": ratios(measured, "prefill of the base"),
            }
    result |= environment()
    given.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
