"""Chains whose later stages go on from what the earlier ones have in the cache, against reading each prompt again.

    .venv/bin/python benchmarks/chain_stages.py --model FOLDER --dtype bfloat16   # writes benchmarks/chain_stages.json

The same questions, prompts, seeds and engine; only what an ended sequence leaves behind is kept or not. `A/A` is the
engine against itself: its distance from 1 is noise. Tokens computed are counted, so they have none.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mote.chains.make import make_chains
from mote.core.files import write_json
from mote.core.machine import environment
from mote.core.recipe_file import load_recipe
from mote.core.records import ChainRow, Question, read_rows
from mote.core.scheme import load_scheme
from mote.evals.judges.by_kind import KindJudge
from mote.inference import batching
from mote.inference.engines.local import LocalEngine
from mote.models.load import Base, load_base
from mote.questions.load import load_questions

ROOT = Path(__file__).resolve().parents[1]
KEPT = batching._ENDED_TOKENS
VARIANTS = {"kept": KEPT, "read again": 0, "again": KEPT}


def run(base: Base, questions: Sequence[Question], batch_size: int, kept: int) -> tuple[float, int, list[Any]]:
    """Chains a minute, tokens computed and the chains, with so many tokens kept a slot."""
    recipe = load_recipe(ROOT / "recipes" / "self-align-1.5b.yaml")
    settings = recipe.chains.model_copy(update={"batch_size": batch_size})
    scheme = load_scheme(recipe.scheme)
    batching._ENDED_TOKENS = kept
    batch = batching.Batcher(base.model, batch_size)
    engine = LocalEngine(base, batch_size, batch)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chains.jsonl"
        began = time.monotonic()
        asyncio.run(make_chains(questions, engine, KindJudge(scheme), scheme, settings, 0, path))
        rate = len(questions) / (time.monotonic() - began) * 60
        made = sorted((row.id, [step.text for step in row.steps]) for row in read_rows(path, ChainRow))
    return rate, batch.tokens_computed, made


def main() -> None:
    """Measure the variants in turn and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args()
    base = load_base(given.model, device="cpu", dtype=given.dtype)
    # Wrapped questions, which get all steps: others have a single stage.
    rows = load_questions(str(ROOT / "benchmarks" / "self_alignment" / "questions.jsonl"), None)
    questions = [row for row in rows if "+" in row.source][: given.questions]
    rates: dict[str, list[float]] = {name: [] for name in VARIANTS}
    tokens: dict[str, int] = {}
    chains: dict[str, list[Any]] = {}
    for turn in range(given.rounds):
        for name, kept in VARIANTS.items():
            rate, tokens[name], chains[name] = run(base, questions, given.batch_size, kept)
            rates[name].append(rate)
            print(f"round {turn + 1}: {name}: {rate:.1f} chains a minute, {tokens[name]} tokens computed", flush=True)
    same = sum(one == other for one, other in zip(chains["kept"], chains["read again"], strict=True))
    ratios = {
        name: [one / other for one, other in zip(rates["kept"], rates[of], strict=True)]
        for name, of in (("over read again", "read again"), ("A/A", "again"))
    }
    result = {
        "what": "chains a minute with the cache of ended sequences, over those without it, of the same rounds",
        "shape": {"model": base.name, "dtype": given.dtype, "questions": len(questions),
                  "batch_size": given.batch_size, "rounds": given.rounds, "threads": torch.get_num_threads()},
        "chains_a_minute": {name: [round(rate, 2) for rate in found] for name, found in rates.items()},
        "tokens_computed": tokens,
        "ratio": {
            name: {"median": round(statistics.median(found), 2), "rounds": [round(one, 2) for one in found]}
            for name, found in ratios.items()
        },
        "same_chains": f"{same} of {len(questions)}",
        **environment(),
    }  # fmt: skip
    write_json(given.out, result)
    print(json.dumps(result["ratio"], indent=2))


if __name__ == "__main__":
    main()
