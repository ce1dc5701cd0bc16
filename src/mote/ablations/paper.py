"""Our numbers beside the paper's: one line for us and one for the paper, and what differs between the two.

A refusal rate has a column of its own: it never stands under the paper's Harm.
"""

from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict

from mote.ablations.differences import differences
from mote.ablations.recipe import Ablations
from mote.ablations.rows import Interval, Judged, Measured, Result, interval
from mote.errors import UserError

OURS, PAPER = "ours", "paper"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Column(_Strict):
    """A column of the paper's table.

    Attributes:
        name: As the paper has it.
        metric: Our name of the number.
        percent: Whether it is printed in percent.
        over: Row whose number is the unit.
    """

    name: str
    metric: str
    percent: bool = False
    over: str | None = None


class PaperRow(_Strict):
    """A row of the paper's table.

    Attributes:
        name: As the paper has it.
        ours: What stands for it here; its name where none is given.
        model: The row's model, where it is not that of the table.
        values: One a column; none where the paper prints no numbers.
    """

    name: str
    ours: str = ""
    model: str = ""
    values: tuple[float, ...] = ()

    @property
    def key(self) -> str:
        """Variant, mode or step of ours."""
        return self.ours or self.name


class PaperTable(_Strict):
    """A table or figure of the paper.

    Attributes:
        title: Its number and what it is about.
        prompts: What was asked.
        model: The model, where the paper names one for the whole table.
        columns: The columns.
        by: Whether our rows are variants, or parts of the only one: its modes, or the steps of its chains.
        rows: The rows.
        says: What the text says of it.
        here: How the numbers of ours are made, where that needs a word.
    """

    title: str
    prompts: str
    model: str = ""
    columns: tuple[Column, ...]
    by: Literal["variant", "part"] = "variant"
    rows: tuple[PaperRow, ...]
    says: str = ""
    here: str = ""


class PaperSetup(_Strict):
    """The set-up of section 4.1: `settings` by their names in a recipe, and the batch of an update."""

    model: str
    questions: str
    judge: str
    settings: dict[str, float]
    batch: int


class Cell(_Strict):
    """A number: of the paper the value alone.

    Attributes:
        value: The number, None where nothing could be measured.
        half: Half of the 95 % interval over seeds, where there are several.
        low: Lower end of the 95 % interval over prompts, where there is one seed.
        high: Its upper end.
        n: Judged answers over all seeds; 0 of numbers that nobody judges.
        unparsed: Verdicts that could not be read.
        absent: Answers without the step that was to be judged.
        judge: Name of the judge; empty of numbers that nobody judges.
    """

    value: float | None
    half: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    unparsed: int = 0
    absent: int = 0
    judge: str = ""

    def text(self) -> str:
        """As a table shows it."""
        if self.value is None:
            shown = "none"
        elif self.half is not None:
            shown = f"{self.value:.4g} ± {self.half:.2g}"
        elif self.low is not None and self.high is not None:
            shown = f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"
        else:
            shown = f"{self.value:.4g}"
        notes = [f"n {self.n}"] if self.judge else []
        notes += [f"{count} {what}" for count, what in ((self.unparsed, "unparsed"), (self.absent, "absent")) if count]
        return " ".join([shown, *([f"({', '.join(notes)})"] if notes else [])])


class TableLine(_Strict):
    """A line: a row's numbers, ours or the paper's, by the names of their columns."""

    row: str
    whose: Literal["ours", "paper"]
    model: str
    cells: dict[str, Cell]


class PaperComparison(_Strict):
    """`table.json`: the table, both sides.

    Attributes:
        title: The paper's table.
        columns: The paper's columns, then those that only we have.
        lines: Row by row, ours above the paper's.
        says: What the paper's text says of it.
        differences: What differs, a sentence each.
    """

    title: str
    columns: tuple[str, ...]
    lines: tuple[TableLine, ...]
    says: str
    differences: tuple[str, ...]

    def markdown(self) -> str:
        """The table and what differs, as text."""
        rows = [["row", "whose", *self.columns], ["---"] * (len(self.columns) + 2)]
        for line in self.lines:
            missing = "not measured" if line.whose == OURS else "not given"
            cells = [line.cells[name].text() if name in line.cells else missing for name in self.columns]
            rows.append([line.row, f"{line.whose}, {line.model}" if line.model else line.whose, *cells])
        text = [f"# {self.title}", "", *(f"| {' | '.join(row)} |" for row in rows), ""]
        text += [f"The paper's text: {self.says}.", ""] if self.says else []
        text += ["What differs:", "", *(f"- {difference}" for difference in self.differences), ""]
        return "\n".join(text)


@cache
def _figures() -> dict[str, Any]:
    text = (resources.files("mote.ablations") / "figures.yaml").read_text(encoding="utf-8")
    figures: dict[str, Any] = yaml.safe_load(text)
    return figures


def paper_setup() -> PaperSetup:
    """The paper's set-up."""
    return PaperSetup.model_validate(_figures()["setup"])


def paper_table(name: str) -> PaperTable:
    """A table of the paper by its name.

    Raises:
        UserError: It is not one of those that are known.
    """
    tables = _figures()["tables"]
    if name not in tables:
        raise UserError(f"table: '{name}' is none of {sorted(tables)}")
    return PaperTable.model_validate(tables[name])


def beside_the_paper(wanted: Ablations, result: Result, judge: str, data: Path | None) -> PaperComparison:
    """What was measured so far beside the paper's numbers.

    Args:
        wanted: What is compared; has a table.
        result: What was measured.
        judge: Who judged.
        data: Folder of the upstream files, None where the package's own questions were asked.
    """
    table = paper_table(wanted.table or "")
    parts = (
        [row.key for row in table.rows] if table.by == "part" else list(dict.fromkeys(r.variant for r in result.rows))
    )
    ours = {part: _ours(table, result.rows, part) for part in parts}
    extra = dict.fromkeys(name for cells in ours.values() for name in cells)
    columns = [column.name for column in table.columns]
    columns += [name for name in extra if name not in columns]
    model = wanted.recipe.model
    lines = []
    for row in table.rows:
        if cells := ours.pop(row.key, None):
            lines.append(TableLine(row=row.name, whose=OURS, model=model, cells=cells))
        given = {column.name: Cell(value=value) for column, value in zip(table.columns, row.values, strict=False)}
        lines.append(TableLine(row=row.name, whose=PAPER, model=row.model or table.model, cells=given))
    lines += [TableLine(row=part, whose=OURS, model=model, cells=cells) for part, cells in ours.items() if cells]
    return PaperComparison(
        title=table.title,
        columns=tuple(columns),
        lines=tuple(lines),
        says=table.says,
        differences=tuple(_notes(wanted, table, result, lines, judge, data)),
    )


def _notes(
    wanted: Ablations, table: PaperTable, result: Result, lines: Sequence[TableLine], judge: str, data: Path | None
) -> list[str]:
    setup = paper_setup()
    built = {line.row for line in lines if line.whose == OURS}
    missing = [row.name for row in table.rows if row.name not in built]
    notes = differences(
        wanted,
        result.rows,
        judge,
        data,
        model=table.model or setup.model,
        questions=setup.questions,
        asked=table.prompts,
        judged_by=setup.judge,
        settings={**setup.settings, "batch": setup.batch},
    )
    if table.here:
        notes.append(f"{table.here}.")
    if missing:
        notes.append(f"Rows that are not built here: {', '.join(missing)}.")
    if not any(row.values for row in table.rows):
        notes.append("It is a figure: the paper does not print its numbers.")
    return notes


def _ours(table: PaperTable, rows: Sequence[Measured], part: str) -> dict[str, Cell]:
    """Our cells of a row: those of the paper's columns, then the judged ones, tokens and loss that only we have."""
    by_part = table.by == "part"
    own = [row for row in rows if by_part or row.variant == part]
    found: dict[str, Cell] = {}
    for column in table.columns:
        names = [f"{column.metric} {part}"] if by_part else [column.metric, *{f"{column.metric} {r.mode}" for r in own}]
        unit = [row for row in rows if row.variant == column.over]
        cell = _cell(own, names, 100 if column.percent else 1, unit)
        if cell is not None:
            found[column.name] = cell
    known = {column.metric for column in table.columns}
    suffixes = {part} if by_part else {row.mode for row in own}
    extra = dict.fromkeys(
        name
        for row in own
        for name in [*row.judged, *(f"tokens {suffix}" for suffix in suffixes), "loss all"]
        if name == "loss all" or (name.rpartition(" ")[2] in suffixes and name.rpartition(" ")[0] not in known)
    )
    for name in extra:
        cell = _cell(own, [name], 1, [])
        if cell is not None and not (by_part and name == "loss all"):
            found[name if name == "loss all" else name.rpartition(" ")[0]] = cell
    return found


def _cell(rows: Sequence[Measured], names: Sequence[str], scale: float, unit: Sequence[Measured]) -> Cell | None:
    """One number over the seeds of a variant; None where it was not measured.

    Args:
        rows: The variant, a row a seed.
        names: Names under which the number can stand.
        scale: What it is multiplied by.
        unit: The rows whose number it is divided by, where there are any.
    """
    name = next((name for name in names if any(name in row.measures or name in row.judged for row in rows)), None)
    if name is None:
        return None
    if unit:
        scale /= interval([row.measures[name] for row in unit]).mean
    values = [scale * row.measures[name] for row in rows if name in row.measures]
    over = interval(values) if values else Interval(mean=0.0, half=None, seeds=0)
    judged: list[Judged] = [row.judged[name] for row in rows if name in row.judged]
    alone = judged[0] if len(judged) == 1 else None
    return Cell(
        value=over.mean if values else None,
        half=over.half,
        low=scale * alone.low if alone and alone.low is not None else None,
        high=scale * alone.high if alone and alone.high is not None else None,
        n=sum(one.n for one in judged),
        unparsed=sum(one.unparsed for one in judged),
        absent=sum(one.absent for one in judged),
        judge=judged[0].judge if judged else "",
    )
