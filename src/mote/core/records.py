"""Typed rows and the append-only JSONL files that hold them.

Rows are appended whole and fsynced; a killed process can tear the last line only, which the next writer cuts off. The
fields' descriptions are the tables of docs/files.md.
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

    role: Literal["system", "user", "assistant"] = Field(description="Speaker of the turn.")
    content: str = Field(description="Text of the turn.")


class Question(Frozen):
    """A dialogue whose last turn is the user's: what is to be answered."""

    id: str = Field(
        description="The source's id if it has one, else a prefix and 12 hex digits of the messages' sha256; the same "
        "in every run."
    )
    messages: tuple[Message, ...] = Field(min_length=1, description="The dialogue; the last turn is the user's.")
    kind: Kind = Field("unknown", description="Label of the question in its source.")
    source: str = Field("", description="Data set the question comes from; `own` for a file of your own.")

    @property
    def text(self) -> str:
        """The last user turn."""
        return self.messages[-1].content


class LeftOut(Question):
    """A question that gets no chain, because it resembles the row `like` of `file`."""

    why: Literal["evaluation", "near-duplicate"] = Field(
        description="`evaluation`: it overlaps with an evaluation question; `near-duplicate`: it nearly repeats an "
        "earlier question."
    )
    like: str = Field(description="Id of the row it resembles.")
    file: str = Field(description="File of that row.")


class StepText(Frozen):
    """The text of one step."""

    name: str = Field(description="Name of the step.")
    text: str = Field(description="Text of the step, without markers.")


class Check(Frozen):
    """Safety Checking of the answer at one depth.

    In a chain the base model or another judge checks; in an answer, the model's own trained check.
    """

    depth: str = Field(description="Mode whose chain was tried, such as `direct`, `analysis`, `full`.")
    answer: str = Field(description="The answer that was judged.")
    safe: bool = Field(description="Whether the judge passed it.")
    score: float | None = Field(
        description="The judge's score: with `chains.check=self`, and for an answer's trained check, the probability "
        "of the passing word against the other. None if the verdict could not be parsed."
    )


class ChainTokens(Frozen):
    """Tokens generated and prefilled for a chain.

    Self-checks (`chains.check=self` or `verdict`) count, another judge's do not.
    """

    made: int = Field(description="Tokens generated for this chain, including discarded samples and self-checks.")
    kept: int = Field(description="Tokens of the steps in the final chain.")
    read: int | None = Field(
        None,
        description="Prompt tokens of all its requests, self-checks included; a prefix that requests share "
        "counts each time. None if a server does not report it, and in rows older than this field.",
    )


class ChainRow(Question):
    """A question with its reasoning chain (section 3.1); only safe and unrejected chains are trained on."""

    steps: tuple[StepText, ...] = Field(
        description="The chain in order; the last step is the answer. Empty if the question was rejected (`question: "
        "unsure`)."
    )
    safe: bool = Field(description="Whether the last answer was judged safe.")
    rejected: str | None = Field(
        None,
        description="Step and name of the first quality rule that the chain breaks, such as `analysis: looping`; "
        "`response: refused` or `check: refused` if the engine or the judge refused a request. None if it breaks none.",
    )
    checks: tuple[Check, ...] = Field(
        description="Every answer that was tried, with its verdict; empty for imported chains."
    )
    model: str = Field(description="Model that wrote the chain.")
    prompts: str = Field(
        description="sha256 of the scheme's content with the worked examples that prompts show (decision 20); empty "
        "for imported chains."
    )
    seed: int = Field(description="Seed of the run.")
    tokens: ChainTokens = Field(description="Tokens generated, kept and prefilled; 0 for imported chains.")
    seconds: float = Field(
        description="The chain's share of the wall-clock time, which is split evenly among the chains in flight."
    )

    @property
    def accepted(self) -> bool:
        """Whether the chain is good enough to train on."""
        return self.outcome == "accepted"

    @property
    def outcome(self) -> Outcome:
        """Accepted, rejected by a quality rule, or still judged unsafe after the last attempt."""
        if self.rejected is not None:
            return "rejected"
        return "accepted" if self.safe else "unsafe"

    @property
    def step_names(self) -> tuple[str, ...]:
        """The names of its steps, in order."""
        return tuple(step.name for step in self.steps)


class AnswerTokens(Frozen):
    """Tokens generated for an answer, markers included."""

    steps: dict[str, int] = Field(
        description="Tokens of each step of the answer's chain, its markers included; `check` counts one per verdict."
    )
    total: int = Field(description="All tokens.")
    dropped: int = Field(
        0, description="Tokens of the answers that the check did not pass, and of the steps before them."
    )


class Answer(Question):
    """What a system answered in one mode."""

    system: str = Field(description="Name of the system, `answer.system` of the recipe.")
    mode: str = Field(description="Mode of the answer.")
    steps: tuple[StepText, ...] = Field(description="The whole chain of the answer.")
    answer: str = Field(description="Text of the response: what a user reads.")
    finish: Finish = Field(description="`stop`, or `length` if the response used up its token budget.")
    tokens: AnswerTokens = Field(description="Tokens generated.")
    seconds: float = Field(description="Wall-clock time of its batch, divided by the answers in it.")
    safe: bool | None = Field(
        None,
        description="Verdict of the model's own check; false if the answer of the deepest chain was still judged "
        "unsafe. None in modes without a check.",
    )
    checks: tuple[Check, ...] = Field(
        (), description="Mode `adaptive+check`: every answer that was tried, with its verdict."
    )

    @property
    def step_names(self) -> tuple[str, ...]:
        """The names of its steps, in order."""
        return tuple(step.name for step in self.steps)


Row = TypeVar("Row", bound=BaseModel)


def append_rows(path: Path, rows: Sequence[BaseModel]) -> None:
    """Append rows to a JSONL file in one write, and fsync.

    Raises:
        MoteError: They cannot be written (disk full, read-only); earlier rows are untouched.
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
        with suppress(OSError):  # remove a row that was written in part
            cut_torn_line(path)
        raise MoteError(
            f"{path}: cannot be written ({error.strerror}); free space there, then run the same command again: "
            "finished rows are kept"
        ) from error


def cut_torn_line(path: Path) -> None:
    """Cut off a last line without a newline, which a killed writer left."""
    if not path.is_file() or not (size := path.stat().st_size):
        return
    with open(path, "rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n":
            return
        keep = 0
        block = 1 << 16
        for start in range((size - 1) // block * block, -1, -block):
            file.seek(start)
            newline = file.read(min(block, size - start)).rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
        file.truncate(keep)


def read_rows(path: Path, row_type: type[Row]) -> list[Row]:
    """All rows of a file that this package wrote; a torn last line is skipped, a missing file has no rows.

    Raises:
        UserError: A line is not a row of this type; names the file, the line and the first error.
    """
    return list(iter_rows(path, row_type))


def iter_rows(path: Path, row_type: type[Row]) -> Iterator[Row]:
    """`read_rows`, one row at a time."""
    if not path.exists():
        return
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a JSONL file of {row_type.__name__} rows")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield row_type.model_validate_json(line)
            except ValidationError as error:
                raise UserError(
                    f"{path} line {number}: not a {row_type.__name__} row ({first_line(error)}); "
                    "remove the line or the file and run again"
                ) from error


def rewrite_rows(path: Path, rows: Iterable[BaseModel]) -> None:
    """Replace a JSONL file with these rows atomically; they are streamed, not held in memory."""
    write_atomic(path, (row.model_dump_json() + "\n" for row in rows))


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Lock a run folder against other processes while this one writes to it.

    A folder that was made for the lock is removed if the context fails before anything is written to it.

    Raises:
        UserError: Another process holds the folder, or it cannot be made.
    """
    lock = folder / ".lock"
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle: IO[str] = open(lock, "w")  # noqa: SIM115 (open for as long as the lock is held)
    except OSError as error:
        raise UserError(f"out: {folder} cannot be used ({error.strerror}); give another folder with --out") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.stat()  # missing if the process that held it has failed and removed it since the file was opened
        except OSError as error:
            raise UserError(f"out: {folder} is in use by another mote process; wait for it or use --out") from error
        try:
            yield
        except BaseException:
            if made and list(folder.iterdir()) == [lock]:
                lock.unlink()
                for path in made:
                    with suppress(OSError):  # another process uses it by now
                        path.rmdir()
            raise
