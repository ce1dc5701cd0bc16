"""Readers of human-labelled answers in their upstream formats: XSTest completions, JailbreakBench judge comparison."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mote.chains.judge import COMPLIANCE, FULL_REFUSAL, PARTIAL_REFUSAL
from mote.core.errors import UserError

FormatName = Literal["xstest", "jailbreakbench"]
HARMFUL = "harmful"
HARMLESS = "harmless"

_XSTEST = {"1_full_compliance": COMPLIANCE, "2_full_refusal": FULL_REFUSAL, "3_partial_refusal": PARTIAL_REFUSAL}
_JAILBREAKBENCH = {"0": HARMLESS, "1": HARMFUL}


@dataclass(frozen=True)
class LabelFormat:
    """Columns of a labelled set.

    Attributes:
        question: Column of the question; for a jailbreak the goal, not the attack.
        answer: Column of the answer.
        id: Column of the prompt's id.
        people: Columns of the individual labels.
        final: Column of the final label.
        values: Value of a label column -> label.
    """

    question: str
    answer: str
    id: str
    people: tuple[str, ...]
    final: str
    values: Mapping[str, str]


FORMATS: dict[str, LabelFormat] = {
    "xstest": LabelFormat("prompt", "completion", "id", ("annotation_1", "annotation_2"), "final_label", _XSTEST),
    "jailbreakbench": LabelFormat(
        "goal", "target_response", "Index", ("human1", "human2", "human3"), "human_majority", _JAILBREAKBENCH
    ),
}


@dataclass(frozen=True)
class Labelled:
    """One answer with its final label; `columns` holds all label columns, of people and of models."""

    number: int
    question: str
    answer: str
    label: str
    columns: Mapping[str, str]


def read_labels(paths: Sequence[Path], form: FormatName | None = None) -> tuple[FormatName, list[Labelled]]:
    """Read label files of one format.

    Args:
        paths: CSV files, UTF-8 or Latin-1 (as JailbreakBench's is).
        form: Their format; inferred from the columns if None.

    Returns:
        The format and the rows, in file order.

    Raises:
        UserError: A file cannot be read or has another or an unknown format, or a label is invalid.
    """
    rows: list[Labelled] = []
    for path in paths:
        table = _table(path)
        form = form or _format_of(table, path)
        rows += [_row(row, FORMATS[form], f"labels: {path} row {i}") for i, row in enumerate(table, 1)]
    if form is None or not rows:
        raise UserError("labels: no file was given; give one with --labels")
    return form, rows


def _table(path: Path) -> list[dict[str, str]]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"labels: {path} cannot be read ({error.strerror}); give a CSV file of labelled answers"
        ) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    try:
        table = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise UserError(f"labels: {path} is not valid CSV ({error}); get the file again") from error
    if not table:
        raise UserError(f"labels: {path} holds no rows; get the file again")
    return table


def _format_of(table: list[dict[str, str]], path: Path) -> FormatName:
    names: tuple[FormatName, ...] = ("xstest", "jailbreakbench")
    for name in names:
        form = FORMATS[name]
        if {form.question, form.answer, form.final} <= set(table[0]):
            return name
    needed = " or ".join(f"{f.question}, {f.answer}, {f.final} ({name})" for name, f in FORMATS.items())
    raise UserError(f"labels: {path} has the columns {list(table[0])}; needed are {needed}")


def _row(row: dict[str, str], form: LabelFormat, where: str) -> Labelled:
    missing = [column for column in (form.id, form.question, form.answer, form.final) if row.get(column) is None]
    if missing:
        raise UserError(f"{where}: no {', '.join(missing)}; give a file of the set, or another --format")
    if row[form.final] not in form.values:
        raise UserError(f"{where}: {form.final}={row[form.final]!r} is not one of {list(form.values)}; correct the row")
    digits = "".join(char for char in row[form.id].rpartition("-")[2] if char.isdigit())
    return Labelled(
        number=int(digits or 0),
        question=row[form.question],
        answer=row[form.answer],
        label=form.values[row[form.final]],
        columns={column: form.values[value] for column, value in row.items() if value in form.values},
    )
