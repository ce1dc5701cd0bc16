"""Chains per minute: continuous batching against a plain loop of `generate` and against fixed batches, on one machine.

    .venv/bin/python benchmarks/chains.py        # about 20 minutes a round on two cores; writes benchmarks/chains.json

All make chains for the same questions with the same prompts and settings; only the engine differs. The plain loop is so
slow that it makes only a few of the chains per round. `A/A` is continuous batching against itself: its distance from 1
is noise.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from mote.chains.engine import Completion, Engine, Preference, Prompt
from mote.chains.make import make_chains
from mote.chains.prompts import check_prompt
from mote.chains.safety_check import ChoiceJudge
from mote.core.files import write_json
from mote.core.generation import Sampling
from mote.core.machine import environment
from mote.core.recipe import ChainSettings
from mote.core.records import ChainRow, Question, read_rows
from mote.core.scheme import load_scheme
from mote.inference.engines.local import LocalEngine
from mote.inference.sequence import draw
from mote.models.embedded import EMBEDDED
from mote.models.load import Base, load_base
from mote.questions.load import load_questions
from mote.tokens.encode import encode_prompt

SETTINGS = {"max_tokens": 72, "temperature": 0.7, "top_p": 0.9, "examples": 2, "threshold": 0.17, "retries": 1}


class SeededSampler(LogitsProcessor):
    """The running batch's sampling for transformers' `generate`: the drawn token is the only choice left."""

    def __init__(self, samplings: Sequence[Sampling], prompt_length: int) -> None:
        self.samplings = samplings
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) with all but the drawn token at minus infinity."""
        generated = input_ids.shape[1] - self.prompt_length
        tokens = draw(scores, self.samplings, [generated] * len(self.samplings))
        return torch.full_like(scores, float("-inf")).scatter(1, tokens[:, None], 0.0)


class FixedBatches:
    """Fixed batches of `generate`, each as long as its longest text; with one row it is the plain loop."""

    def __init__(self, base: Base, batch_size: int) -> None:
        self.name = base.name
        self.base = base
        self.batch_size = batch_size
        self.waiting: list[tuple[Prompt, tuple[str, str] | None, asyncio.Future[Any]]] = []
        self.working = False

    async def write(self, prompt: Prompt) -> Completion:
        """See `Engine.write`."""
        completion: Completion = await self._ask(prompt, None)
        return completion

    async def choose(self, prompt: Prompt, choices: tuple[str, str]) -> Preference:
        """See `Engine.choose`."""
        return Preference(await self._ask(prompt, choices))

    async def close(self) -> None:
        """See `Engine.close`."""

    async def _ask(self, prompt: Prompt, choices: tuple[str, str] | None) -> Any:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.waiting.append((prompt, choices, future))
        if not self.working:
            self.working = True
            asyncio.get_running_loop().call_soon(self._settle, 3)
        return await future

    def _settle(self, turns: int) -> None:
        """Collect the requests of all chains that can continue before a batch is formed."""
        loop = asyncio.get_running_loop()
        if turns:
            loop.call_soon(self._settle, turns - 1)
            return
        kind = self.waiting[0][1]
        batch = [item for item in self.waiting if item[1] == kind][: self.batch_size]
        self.waiting = [item for item in self.waiting if item not in batch]
        results = self._choose(batch, kind) if kind else self._write([prompt for prompt, *_ in batch])
        for (_, _, future), result in zip(batch, results, strict=True):
            future.set_result(result)
        self.working = bool(self.waiting)
        if self.waiting:
            loop.call_soon(self._settle, 3)

    def _padded(self, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [encode_prompt(self.base.tokenizer, prompt.messages) for prompt in prompts]
        longest = max(map(len, rows))
        ids = [[self.base.tokenizer.pad_token_id] * (longest - len(row)) + row for row in rows]
        return torch.tensor(ids), torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])

    @torch.inference_mode()
    def _write(self, prompts: Sequence[Prompt]) -> list[Completion]:
        ids, mask = self._padded(prompts)
        first = prompts[0]
        eos = self.base.tokenizer.eos_token_id
        samplings = [Sampling(first.temperature, first.top_p, prompt.seed) for prompt in prompts]
        sampler = SeededSampler(samplings, ids.shape[1])
        out = self.base.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=first.max_tokens, do_sample=False,
            logits_processor=[sampler], eos_token_id=eos, pad_token_id=self.base.tokenizer.pad_token_id,
        )[:, ids.shape[1] :].tolist()  # fmt: skip
        kept = [row[: row.index(eos)] if eos in row else row for row in out]
        texts = [self.base.tokenizer.decode(row, skip_special_tokens=True).strip() for row in kept]
        return [
            Completion(text, len(row), "stop" if eos in full else "length")
            for text, row, full in zip(texts, kept, out, strict=True)
        ]

    @torch.inference_mode()
    def _choose(self, batch: Sequence[Any], choices: tuple[str, str]) -> list[float]:
        ids, mask = self._padded([prompt for prompt, *_ in batch])
        pair = [self.base.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in choices]
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        logits = self.base.model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1).logits
        scores: list[float] = logits[:, -1, pair].float().softmax(-1)[:, 0].tolist()
        return scores


def chains_a_minute(engine: Engine, questions: Sequence[Question], batch_size: int) -> tuple[float, list[ChainRow]]:
    """Make the chains; returns chains per minute and the chains."""
    settings = ChainSettings.model_validate({**SETTINGS, "batch_size": batch_size})
    scheme = load_scheme("safety")
    asked = partial(check_prompt, scheme, settings=settings, seed=0)
    judge = ChoiceJudge(engine, asked, "", "self", settings.threshold)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chains.jsonl"
        began = time.monotonic()
        asyncio.run(make_chains(questions, engine, judge, scheme, settings, 0, path))
        return len(questions) / (time.monotonic() - began) * 60, read_rows(path, ChainRow)


def main() -> None:
    """Measure all variants in turn and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--plain", type=int, default=6, help="chains that the plain loop makes in a round")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args()
    base = load_base(EMBEDDED, device="cpu")
    rows = given.batch_size
    questions = load_questions("mote:train", given.questions)
    rates: dict[str, list[float]] = {name: [] for name in ("continuous", "again", "fixed", "plain")}
    texts: dict[str, list[Any]] = {}
    for turn in range(given.rounds):
        few = questions[turn * given.plain % len(questions) :][: given.plain]
        for name, asked, engine, size in (
            ("continuous", questions, LocalEngine(base, rows), rows),
            ("fixed", questions, FixedBatches(base, rows), rows),
            ("plain", few, FixedBatches(base, 1), 1),
            ("again", questions, LocalEngine(base, rows), rows),
        ):
            rate, made = chains_a_minute(engine, asked, size)
            rates[name].append(rate)
            texts[name] = sorted((row.id, [step.text for step in row.steps]) for row in made)
            print(f"round {turn + 1}: {name} {rate:.1f} chains a minute", flush=True)
    ratios = {
        name: [one / other for one, other in zip(rates["continuous"], rates[name], strict=True)]
        for name in ("again", "fixed", "plain")
    }
    same = sum(one == other for one, other in zip(texts["continuous"], texts["fixed"], strict=True))
    result = {
        "what": "chains a minute by continuous batching over those of each other way, of the same rounds",
        "shape": {"model": EMBEDDED, "questions": len(questions), "batch_size": rows, "plain_questions": given.plain,
                  "rounds": given.rounds, "threads": torch.get_num_threads(), **SETTINGS},
        "chains_a_minute": {name: [round(rate, 2) for rate in found] for name, found in rates.items()},
        "ratio": {
            {"again": "A/A"}.get(name, name): {
                "median": round(statistics.median(found), 2), "min": round(min(found), 2), "max": round(max(found), 2)
            }
            for name, found in ratios.items()
        },
        "targets": {"plain": 5.0, "fixed": 1.5},
        "same_chains_as_fixed": f"{same} of {len(questions)}",
        **environment(),
    }  # fmt: skip
    write_json(given.out, result)
    print(json.dumps(result["ratio"], indent=2))


if __name__ == "__main__":
    main()
