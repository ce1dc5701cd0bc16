"""Typed rows and the append-only JSONL files that hold them.

A row is written whole and fsynced; what kill -9 tears is the last line at most, and the next writer cuts it off.
"""

import fcntl
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mote.core.errors import MoteError, UserError, first_line
from mote.core.files import write_atomic

Kind = Literal["harmful", "benign", "unknown"]
Finish = Literal["stop", "length"]
Outcome = Literal["accepted", "unsafe", "rejected"]


class Frozen(BaseModel):
    """Base of immutable values and rows."""

    model_config = ConfigDict(frozen=True)


class Strict(Frozen):
    """Base of values that users write in YAML: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid")


class Message(Frozen):
    """One turn of a dialogue."""

    role: Literal["system", "user", "assistant"]
    content: str


class Question(Frozen):
    """What is to be answered: a dialogue whose last turn is the user's."""

    id: str
    messages: tuple[Message, ...] = Field(min_length=1)
    kind: Kind = "unknown"
    source: str = ""

    @property
    def text(self) -> str:
        """The last user turn."""
        return self.messages[-1].content


class LeftOut(Question):
    """A question that no chain is made for: it resembles the row `like` of `file`."""

    why: Literal["evaluation", "near-duplicate"]
    like: str
    file: str


class StepText(Frozen):
    """What was written in one step."""

    name: str
    text: str


class Check(Frozen):
    """Safety Checking of the answer at one depth: `score` is the judge's, None where its verdict could not be read.

    Of a chain that is made, the judge is the base model or another one; of an answer, it is its own trained check.
    """

    depth: str
    answer: str
    safe: bool
    score: float | None


class ChainTokens(Frozen):
    """Tokens the model wrote for a chain, those of them that the chain kept, and those it read.

    What its own checks read and wrote counts; what another model's checks did does not. `read` is None where it is not
    known: a server does not say it, or the row is older than the field.
    """

    made: int
    kept: int
    read: int | None = None


class ChainRow(Question):
    """A question with its reasoning chain (section 3.1).

    `safe` is False where the last answer was still judged unsafe; `rejected` names the quality rule that the chain
    broke, None where it broke none. Only safe and unrejected chains are trained on.
    """

    steps: tuple[StepText, ...]
    safe: bool
    rejected: str | None = None
    checks: tuple[Check, ...]
    model: str
    prompts: str
    seed: int
    tokens: ChainTokens
    seconds: float

    @property
    def accepted(self) -> bool:
        """Whether the chain is good enough to train on."""
        return self.outcome == "accepted"

    @property
    def outcome(self) -> Outcome:
        """Accepted, rejected by a quality rule, or else unsafe to the end."""
        if self.rejected is not None:
            return "rejected"
        return "accepted" if self.safe else "unsafe"

    @property
    def step_names(self) -> tuple[str, ...]:
        """The names of its steps, in order."""
        return tuple(step.name for step in self.steps)


class AnswerTokens(Frozen):
    """Tokens of each step of the answer, of what its own check dropped, and in all (markers included)."""

    steps: dict[str, int]
    total: int
    dropped: int = 0


class Answer(Question):
    """What a system answered in one mode; `answer` is what the user reads, `steps` is its whole chain.

    `safe` is the verdict of its own check, None in modes that do not check; `checks` are all answers that were tried.
    """

    system: str
    mode: str
    steps: tuple[StepText, ...]
    answer: str
    finish: Finish
    tokens: AnswerTokens
    seconds: float
    safe: bool | None = None
    checks: tuple[Check, ...] = ()

    @property
    def step_names(self) -> tuple[str, ...]:
        """The names of its steps, in order."""
        return tuple(step.name for step in self.steps)


Row = TypeVar("Row", bound=BaseModel)


def append_rows(path: Path, rows: Sequence[BaseModel]) -> None:
    """Append rows to a JSONL file in one write and wait until they are on the disk.

    Raises:
        MoteError: The disk refused them (full, read-only); rows that were there before are untouched.
    """
    if not rows:
        return
    data = b"".join(row.model_dump_json().encode() + b"\n" for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_torn_line(path)
        with open(path, "ab", buffering=0) as sink:
            view = memoryview(data)
            while view:
                view = view[sink.write(view) or 0 :]
            os.fsync(sink.fileno())
    except OSError as error:
        with suppress(OSError):  # a row that only half of went in
            cut_torn_line(path)
        raise MoteError(f"{path}: cannot be written ({error.strerror}); free space there, then run the same command "
                        "again: finished rows are kept") from error  # fmt: skip


def cut_torn_line(path: Path) -> None:
    """Cut off a last line that a killed writer left without its newline."""
    if not path.is_file() or not (size := path.stat().st_size):
        return
    with open(path, "rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n":
            return
        keep, step = 0, 1 << 16
        for start in range((size - 1) // step * step, -1, -step):
            file.seek(start)
            newline = file.read(min(step, size - start)).rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
        file.truncate(keep)


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """The whole rows of a file that this package wrote; a torn last line is left out, a missing file is empty.

    Raises:
        UserError: A line is not a row of this kind; names the file, the line and the complaint.
    """
    return list(iter_rows(path, kind))


def iter_rows(path: Path, kind: type[Row]) -> Iterator[Row]:
    """`read_rows`, one row at a time."""
    if not path.exists():
        return
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a JSONL file of {kind.__name__} rows")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield kind.model_validate_json(line)
            except ValidationError as error:
                raise UserError(f"{path} line {number}: not a {kind.__name__} row ({first_line(error)}); "
                                "remove the line or the file and run again") from error  # fmt: skip


def rewrite_rows(path: Path, rows: Iterable[BaseModel]) -> None:
    """Replace a JSONL file with these rows, atomically and one by one."""
    write_atomic(path, (row.model_dump_json() + "\n" for row in rows))


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Keep a second process out of a run folder while this one writes to it.

    Raises:
        UserError: Another process holds the folder, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle: IO[str] = open(folder / ".lock", "w")  # noqa: SIM115 (held open for as long as the lock)
    except OSError as error:
        raise UserError(f"out: {folder} cannot be used ({error.strerror}); give another folder with --out") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"out: {folder} is in use by another mote process; wait for it or use --out") from error
        yield
