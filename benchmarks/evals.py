"""Overhead of the evaluation harness: an Inspect evaluation against plain generation for the same prompts.

    .venv/bin/python benchmarks/evals.py        # about 10 minutes on two cores; writes benchmarks/evals.json

Both answer the same questions in base mode with continuous batching; the evaluation also judges them with the offline
rule and writes its log. They alternate in one process; `bare again` is the A/A control. CPU time is reported too,
because wall time means little on a busy machine.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

from inspect_ai import eval_set, task_with
from inspect_ai.model import get_model

import mote
from mote.core.files import write_json
from mote.core.machine import environment
from mote.evals.tasks.over_refusal import xstest
from mote.models.embedded import EMBEDDED
from mote.questions.load import load_questions


def main() -> None:
    """Measure and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--questions", default="mote:test", help="questions whose kind is known")
    parser.add_argument("--limit", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="budget of an answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args()

    questions = load_questions(given.questions, given.limit)
    model = mote.load(given.model)
    evaluated = get_model(f"mote/{given.model}", max_step_tokens=given.tokens)

    def bare() -> None:
        model.answer(questions, "base", max_step_tokens=given.tokens)

    def harness() -> None:
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            task = task_with(xstest(given.questions, limit=given.limit), model=evaluated)
            done, _ = eval_set(
                [task], log_dir=folder, model=None, display="none", log_level="error", ctl_server=False,
                adaptive_connections=False, max_samples=64, retry_attempts=1, retry_immediate=False,
            )  # fmt: skip
            assert done

    variants = {"bare": bare, "bare again": bare, "harness": harness}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for name, work in variants.items():  # the first time is not counted: it loads and warms up
        measure(work)
        print(f"{name}: warm")
    for _ in range(given.rounds):
        for name, work in variants.items():
            taken[name].append(measure(work))
            print(f"{name}: {taken[name][-1][0]:.1f} s, {taken[name][-1][1]:.1f} s of CPU", flush=True)
    ratios = {
        f"{name} / bare, {what}": round(
            statistics.median(its[i] / base[i] for its, base in zip(taken[name], taken["bare"], strict=True)), 3
        )
        for name in ("bare again", "harness")
        for i, what in enumerate(("seconds", "CPU seconds"))
    }
    result = {
        "settings": {key: str(value) for key, value in vars(given).items() if key != "out"},
        "ratios": ratios,
        "seconds": {name: [round(seconds, 2) for seconds, _ in its] for name, its in taken.items()},
        "cpu_seconds": {name: [round(cpu, 2) for _, cpu in its] for name, its in taken.items()},
        **environment(),
    }
    write_json(given.out, result)
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3f}")


def measure(work: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    clock = time.perf_counter()
    cpu = time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - cpu


if __name__ == "__main__":
    main()
