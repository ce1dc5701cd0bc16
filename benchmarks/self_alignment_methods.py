"""MoTE against what it is compared with, on a small model: trainings, evaluations, rows of self_alignment.json.

    python benchmarks/self_alignment_methods.py --model FOLDER --data DATA --out runs/methods --dtype bfloat16

Every method is trained for two epochs on the same 120 chains of the 1.5B model, drawn with a fixed seed, half of them
with all steps (of all its chains a sixth); `mote` and `lora-x2` with three seeds, the others with one. `response-only`
answers in the mode `direct`, since it learns no other step, and all others in `adaptive`. Trainings and evaluations
that are done are kept, an interrupted one resumes.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import self_alignment_results as results
from self_alignment_chains import draw

from mote.core.files import write_json
from mote.core.records import ChainRow, read_rows, rewrite_rows
from mote.core.scheme import ADAPTIVE, BASE
from mote.train.log import held_out_losses

ROOT = Path(__file__).resolve().parents[1]
CHAINS = ROOT / "benchmarks" / "self_alignment" / "chains-1.5b.jsonl"
RECIPE = ROOT / "recipes" / "self-align-0.5b.yaml"
SUITE = ROOT / "recipes" / "suites" / "self-align-methods.yaml"
MODEL = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
RUNS = [
    ("mote", 0), ("lora-x2", 0), ("lora", 0), ("response-only", 0), ("token-moe", 0), ("mote-no-skip", 0),
    ("mote-no-share", 0), ("mote", 1), ("lora-x2", 1), ("mote", 2), ("lora-x2", 2),
]  # fmt: skip
DIRECT = ("response-only",)  # methods that answer in the mode `direct`
DRAWN, HELD_OUT, EPOCHS = 120, 0.15, 2
LOSSES = {"eval_loss": "loss", "eval_loss_response": "loss_response"}  # name in metrics.jsonl -> metric


def drawn(rows: Sequence[ChainRow]) -> list[ChainRow]:
    """The chains that are trained on, half with all steps: an answer alone shows no routing."""
    whole = [row for row in rows if len(row.steps) > 1]
    plain = [row for row in rows if len(row.steps) == 1]
    return [*draw(whole, DRAWN // 2), *draw(plain, DRAWN // 2)]


def train(given: argparse.Namespace, method: str, seed: int) -> Path:
    """The adapter of a method, trained unless it is there."""
    folder: Path = given.out / f"{method}-{seed}"
    if not (folder / "adapter" / "adapter_config.json").exists():
        run("train", "--recipe", RECIPE, "--model", given.model, "--chains", given.out / "chains.jsonl", "--seed", seed,
            "--out", folder, f"dtype={given.dtype}", f"train.method={method}", f"train.num_train_epochs={EPOCHS}",
            f"train.held_out={HELD_OUT}")  # fmt: skip
    return folder / "adapter"


def evaluate(given: argparse.Namespace, name: str, mode: str, adapters: Mapping[str, Path]) -> Path:
    """The evaluation of these adapters in a mode, finished unless it is."""
    folder: Path = given.out / name
    systems = [part for system, adapter in adapters.items() for part in ("--adapter", f"{system}={adapter}")]
    run("eval", "--suite", SUITE, "--data", given.data, "--model", given.model, "--dtype", given.dtype, "--modes", mode,
        "--out", folder, *systems)  # fmt: skip
    return folder


def run(*command: Any) -> None:
    """Run a `mote` command.

    Raises:
        SystemExit: It failed; it has said why.
    """
    if subprocess.run([Path(sys.executable).with_name("mote"), *map(str, command)], check=False).returncode:
        raise SystemExit(f"`mote {command[0]}` failed; run the same command again to resume")


def loss_rows(folder: Path, method: str, seed: int) -> Iterable[dict[str, Any]]:
    """Held-out losses as rows; the chains held out depend on the seed alone."""
    losses = held_out_losses(folder / "metrics.jsonl", None)
    mode = "direct" if method in DIRECT else ADAPTIVE
    for name, metric in LOSSES.items():
        if name in losses:
            yield {
                "model": MODEL, "method": method, "seed": seed, "mode": mode, "task": "held-out", "metric": metric,
                "value": round(losses[name], 6), "lower": None, "upper": None, "n": round(HELD_OUT * DRAWN),
                "tokens": None, "judge": "", "split": "experiment",
            }  # fmt: skip


def main() -> None:
    """Train, evaluate, and add the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id of the 0.5B model")
    parser.add_argument("--data", type=Path, required=True, help="folder of benchmarks/self_alignment_data.py --out")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--limit", type=int, help="the first N trainings, to try it")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    rewrite_rows(given.out / "chains.jsonl", drawn(read_rows(CHAINS, ChainRow)))
    folders = [evaluate(given, "eval-base", BASE, {})]
    names = []
    losses: list[dict[str, Any]] = []
    for method, seed in RUNS[: given.limit]:
        name = f"{method}-{seed}"
        adapter = train(given, method, seed)
        folders.append(evaluate(given, f"eval-{name}", "direct" if method in DIRECT else ADAPTIVE, {name: adapter}))
        names.append(f"{name}={method}:{seed}")
        losses += loss_rows(given.out / name, method, seed)
        settings = argparse.Namespace(model=MODEL, split="experiment", name=names, against="lora-x2")
        new = results.results([results.read_evaluation(folder) for folder in folders], settings)
        new["rows"] += losses
        old = json.loads(results.OUT.read_text(encoding="utf-8")) if results.OUT.exists() else {}
        write_json(results.OUT, results.merged(old, new))


if __name__ == "__main__":
    main()
