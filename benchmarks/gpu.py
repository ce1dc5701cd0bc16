"""Checks and measures what needs a GPU, in parts of under nine minutes, each with one JSON file (docs/gpu.md).

    PYTHONPATH=src python benchmarks/gpu.py --list
    PYTHONPATH=src python benchmarks/gpu.py --part 1      # on the GPU; writes benchmarks/gpu/correct-CARD.json
    PYTHONPATH=src python benchmarks/gpu.py --dry-run --part 1      # tiny shapes on the CPU

A part is a list of measures. Its file is rewritten after each of them, and the same command goes on with those that
are missing or failed, so a part that ran out of time is simply run again. Ratios are of paired rounds, interleaved in
one process; an A/A control is measured along.
"""

import argparse
import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpu_measures import (
    DRY,
    ROOT,
    SIZES,
    Found,
    Setting,
    correct,
    decoding,
    masks,
    memory,
    running_batch,
    self_alignment,
    skipping,
    stand_in,
    training,
)

MINUTES = 9  # of a part; no measure is begun that would take longer


@dataclass(frozen=True)
class Target:
    """A number to measure; without limits it is only reported."""

    name: str
    at_most: float | None = None
    at_least: float | None = None

    @property
    def text(self) -> str | None:
        """The limit in words."""
        if self.at_most is not None:
            return f"at most {self.at_most:.2f}"
        return None if self.at_least is None else f"at least {self.at_least:.2f}"

    def row(self, value: Any, dry: bool) -> dict[str, Any]:
        """The target with what was measured; the numbers of a dry run are not judged."""
        number = value["median"] if isinstance(value, dict) else value
        met = None
        if self.at_most is not None and not dry:
            met = number <= self.at_most
        elif self.at_least is not None and not dry:
            met = number >= self.at_least
        quartiles = {"quartiles": [value["lower"], value["upper"]]} if isinstance(value, dict) else {}
        return {"name": self.name, "value": number, **quartiles, "target": self.text, "met": met}


@dataclass(frozen=True)
class Measure:
    """One measurement: what it is called, how many minutes to leave for it, what it gives and who takes it."""

    name: str
    minutes: float
    targets: tuple[Target, ...]
    take: Callable[[Setting], Found]


# --- parts


def decoding_targets(how: str, sizes: tuple[str, ...]) -> Iterator[Target]:
    for size in sizes:
        yield Target(f"decoding, {how}: {size}, four experts over LoRA r=32", at_most=1.0)
        yield Target(f"decoding, {how}: {size}, LoRA r=32 again (A/A)")


def training_targets(how: str) -> tuple[Target, ...]:
    return (
        Target(f"training step, {how}: four experts over LoRA r=32", at_most=1.0),
        Target(f"training step, {how}: LoRA r=32 again (A/A)"),
        Target(f"training step, {how}: four experts over LoRA r=64"),
        Target(f"training step, {how}: four experts over the frozen base", at_most=1.1 if how == "compiled" else None),
        Target(f"training step, {how}: masked adapters over four experts"),
    )


PARTS: dict[str, tuple[Measure, ...]] = {
    "correct": (
        Measure("tests", 6, (
            Target("share of the tests that pass", at_least=1.0), Target("tests that ran"),
            Target("largest relative error, float32"), Target("largest relative error, bfloat16"),
        ), correct),
    ),
    "training": (
        Measure("eager", 4, (
            *training_targets("eager"), Target("training step, eager: token-gated over four experts", at_least=1.8),
        ), training(False, ("peft-4-masks", "token-gated"))),
    ),
    "compiled": (Measure("compiled", 8, training_targets("compiled"), training(True, ("peft-4-masks",))),),
    "memory": (
        Measure("eager", 2, (Target("peak memory, eager: four experts over LoRA r=32", at_most=1.02),), memory(False)),
        Measure("compiled", 6, (
            Target("peak memory, compiled: four experts over LoRA r=32", at_most=1.02),
        ), memory(True)),
    ),
    "skipping": (
        Measure("masks", 4, (
            Target("masked over causal attention: long rows", at_most=1.05),
            Target("masked over causal attention: packed rows", at_most=1.05),
            Target("masked over causal attention: one chain a row", at_most=1.05),
            Target("causal attention again (A/A): long rows"),
        ), masks),
        Measure("seven data sets", 4, (
            Target("FLOPs: one pass over the seven data sets", at_most=0.30),
            Target("time: one pass over the seven data sets", at_most=0.35),
            Target("time: one pass again (A/A)"),
        ), skipping),
    ),
    "decoding": (
        Measure("eager", 4, tuple(decoding_targets("eager", SIZES)), decoding(False)),
        Measure("running batch", 4, tuple(
            Target(f"running batch over generate, tokens per second: {size}") for size in SIZES
        ), running_batch),
    ),
    "compiled-decoding": (
        Measure("one row", 8, tuple(decoding_targets("compiled", SIZES[:1])), decoding(True)),
    ),
    "real": (
        Measure("self-alignment", 8, (
            Target("0.5B model: questions"), Target("0.5B model: accepted chains"),
            Target("0.5B model: generated tokens per second, chains"),
            Target("0.5B model: held-out loss, mote"), Target("0.5B model: held-out loss, lora-x2"),
        ), self_alignment),
    ),
}  # fmt: skip


def run_part(name: str, given: Setting, out: Path, again: bool) -> bool:
    """Take the measures of a part that its file lacks; returns whether all are there and none failed."""
    import torch  # noqa: F401 (before `environment`, which names the card)

    from mote.core.files import write_json
    from mote.core.machine import environment

    here = environment()
    card = "cpu" if given.dry else str(here["machine"]["gpu"])
    path = out / f"{name}-{re.sub(r'[^a-z0-9]+', '-', card.lower()).strip('-')}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() and not again else {}
    same = before.get("versions") == here["versions"] and before.get("dry_run") == given.dry
    done: dict[str, Any] = before["measures"] if same else {}
    began = time.monotonic()
    whole = True
    for measure in PARTS[name]:
        if "failed" not in done.get(measure.name, {"failed": ""}):
            continue
        spent = (time.monotonic() - began) / 60
        if spent > 0.1 and spent + measure.minutes > MINUTES:
            print(f"gpu: {measure.name} of {name} is left for the next run of this part", file=sys.stderr)
            whole = False
            break
        print(f"gpu: {name}, {measure.name}", file=sys.stderr, flush=True)
        started = time.monotonic()
        try:
            found = measure.take(given)
            raw = found.pop("raw", None)
            targets = [target.row(found[target.name], given.dry) for target in measure.targets if target.name in found]
            done[measure.name] = {"targets": targets, "seconds": round(time.monotonic() - started, 1), "raw": raw}
            whole &= found.get("share of the tests that pass", 1.0) == 1.0
        except Exception as error:  # the next measure may still work
            traceback.print_exc()
            done[measure.name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
            whole = False
        out.mkdir(parents=True, exist_ok=True)
        targets = [target for taken in done.values() for target in taken.get("targets", ())]
        write_json(
            path, {"part": name, "card": card, "dry_run": given.dry, "targets": targets, "measures": done, **here}
        )
        for target in done[measure.name].get("targets", ()):
            verdict = {True: "met", False: "NOT MET", None: ""}[target["met"]]
            print(
                f"{verdict:<8}{target['value']:>10} {target['name']}"
                + (f" ({target['target']})" if target["target"] else "")
            )
    return whole


def main() -> int:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part", type=int, action="append", choices=range(1, len(PARTS) + 1), metavar=f"1..{len(PARTS)}"
    )
    parser.add_argument("--list", action="store_true", help="what the parts measure")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--again", action="store_true", help="measure again what is there")
    parser.add_argument("--model", type=Path, help="for the last part: a model folder, a GGUF file, or its pieces")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"), help="where the last part works")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "gpu")
    asked = parser.parse_args()
    if asked.list or not asked.part:
        for number, (name, measures) in enumerate(PARTS.items(), 1):
            print(f"{number}  {name:<18} {', '.join(measure.name for measure in measures)}")
        return 0
    sys.path.insert(0, str(ROOT / "src"))
    import torch

    if not asked.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device; --dry-run runs tiny shapes on the CPU")
    if asked.dry_run:
        stand_in()
    given = replace(DRY if asked.dry_run else Setting(), model=asked.model, work=asked.work)
    done = [run_part(list(PARTS)[part - 1], given, asked.out, asked.again) for part in asked.part]
    return int(not all(done))


if __name__ == "__main__":
    sys.exit(main())
