"""Small runs of `mote` commands in processes, for the tests of the command line."""

import re
from collections.abc import Callable
from pathlib import Path

from support import processes
from support.commands import PROGRESS, one_error

QUESTION = '{"question": "How do I boil an egg?"}\n'
SMALL = [
    *(
        "eval=false",
        "limit=8",
        "chains.batch_size=2",
        "chains.max_tokens=24",
        "chains.threshold=0.8",
        "chains.reject=[]",
    ),
    *("experts.r=4", "train.num_train_epochs=4", "train.per_device_train_batch_size=1", "train.save_steps=2"),
    *("train.learning_rate=5e-4", "answer.limit=3", "answer.max_step_tokens=8", "answer.batch_size=1"),
]
PRINTED = re.compile(r"|stage +seconds.*|(chains|train|answer|report) +[\d.]+ .*|report: .*")


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def fails_in_process(where: Path, *arguments: object, code: int, prepare: Callable[[], None] | None = None) -> str:
    """As `fails`, in a separate process: for commands that load a model."""
    log = where / f"{len(list(where.iterdir()))}.log"
    ended, printed = processes.finish([str(argument) for argument in arguments], log, prepare)
    assert ended == code, printed
    return one_error(printed)


def command(recipe: Path, out: Path, *more: str) -> list[str]:
    return ["run", str(recipe), *SMALL, *more, "--out", str(out)]


def assert_finishes(where: Path, arguments: list[str]) -> None:
    code, printed = processes.finish(arguments, where / "finish.log")
    assert code == 0, printed
    assert not [line for line in printed.splitlines() if not PROGRESS.match(line) and not PRINTED.fullmatch(line)]
