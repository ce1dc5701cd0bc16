"""Our numbers next to the paper's: a line for each, and how the set-ups differ.

A refusal rate has a separate column; it is never listed under the paper's Harm.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from mote.core.records import Strict
from mote.experiments.ablations.ablation_recipe import Ablations
from mote.experiments.ablations.ablation_results import Judged, Measured, Result, interval
from mote.experiments.ablations.differences import differences
from mote.experiments.ablations.figures import Column, PaperTable, paper_table

OURS = "ours"
PAPER = "paper"


class Cell(Strict):
    """A number of a table; the paper's have a value only.

    Attributes:
        value: The number; None if nothing could be measured.
        half: Half-width of the 95 % interval over seeds, with several seeds.
        low: Lower end of the 95 % interval over prompts, with one seed.
        high: Its upper end.
        n: Judged answers over all seeds; 0 without a judge.
        unparsed: Verdicts that could not be parsed.
        absent: Answers without the step to be judged.
        judge: Name of the judge; empty without one.
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
        """The cell's text."""
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


class TableLine(Strict):
    """A line: a row's numbers, ours or the paper's.

    Attributes:
        row: The paper's name of the row, or the name of a variant.
        whose: Who measured.
        model: Base model, as far as known.
        cells: Column -> number.
    """

    row: str
    whose: Literal["ours", "paper"]
    model: str
    cells: dict[str, Cell]


class PaperComparison(Strict):
    """`table.json`: our numbers and the paper's.

    Attributes:
        title: The paper's table.
        columns: The paper's columns, then those that only we have.
        of_paper: The paper's columns.
        percent: The columns in percent.
        lines: Row by row, ours above the paper's.
        says: What the paper's text states about it.
        differences: How the set-ups differ, one sentence each.
    """

    title: str
    columns: tuple[str, ...]
    of_paper: tuple[str, ...]
    percent: tuple[str, ...]
    lines: tuple[TableLine, ...]
    says: str
    differences: tuple[str, ...]

    def markdown(self) -> str:
        """The table and the differences as Markdown."""
        heads = [f"{name} %" if name in self.percent else name for name in self.columns]
        rows = [["row", "whose", *heads], ["---"] * (len(self.columns) + 2)]
        for line in self.lines:
            whose = f"{line.whose}, {line.model}" if line.model and line.whose == PAPER else line.whose
            rows.append([line.row, whose, *(self._shown(line, name) for name in self.columns)])
        text = [f"# {self.title}", "", *(f"| {' | '.join(row)} |" for row in rows), ""]
        text += [f"The paper's text: {self.says}.", ""] if self.says else []
        text += ["What differs:", "", *(f"- {difference}" for difference in self.differences), ""]
        return "\n".join(text)

    def _shown(self, line: TableLine, column: str) -> str:
        if column in line.cells:
            return line.cells[column].text()
        if line.whose == OURS:
            return "not measured"
        return "not given" if column in self.of_paper else "-"


def beside_the_paper(wanted: Ablations, result: Result, judge: str, data: Path | None) -> PaperComparison:
    """The results so far next to the paper's numbers.

    Args:
        wanted: The ablations; they name a table.
        result: The results so far.
        judge: The judge.
        data: Folder of the upstream files; None if the package's own questions were asked.
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
        of_paper=tuple(column.name for column in table.columns),
        percent=tuple(column.name for column in table.columns if column.percent),
        lines=tuple(lines),
        says=table.says,
        differences=tuple(_notes(wanted, table, result, lines, judge, data)),
    )


def _notes(
    wanted: Ablations, table: PaperTable, result: Result, lines: Sequence[TableLine], judge: str, data: Path | None
) -> list[str]:
    measured = {line.row for line in lines if line.whose == OURS}
    missing = [row.name for row in table.rows if row.name not in measured]
    notes = differences(wanted, table, result.rows, judge, data)
    if table.here:
        notes.append(f"{table.here}.")
    if missing:
        notes.append(f"Rows without numbers of ours: {', '.join(missing)}.")
    if not any(row.values for row in table.rows):
        notes.append("It is a figure: the paper does not print its numbers.")
    return notes


def _ours(table: PaperTable, rows: Sequence[Measured], part: str) -> dict[str, Cell]:
    """Our cells of a row: the paper's columns, then our own judged numbers, tokens and loss."""
    by_part = table.by == "part"
    own = [row for row in rows if by_part or row.variant == part]
    known = {column.metric for column in table.columns}
    judged = [name.rpartition(" ")[0] for row in own for name in row.judged]
    more = dict.fromkeys([*judged, "tokens", *([] if by_part else ["loss all"])])
    found: dict[str, Cell] = {}
    for column in [*table.columns, *(Column(name=name, metric=name) for name in more if name not in known)]:
        modes = [part] if by_part else list(dict.fromkeys(row.mode for row in own))
        names = [*([] if by_part else [column.metric]), *(f"{column.metric} {mode}" for mode in modes)]
        unit = [row for row in rows if row.variant == column.over]
        cell = _cell(own, names, 100 if column.percent else 1, unit) if unit or not column.over else None
        if cell is not None:
            found[column.name] = cell
    return found


def _cell(rows: Sequence[Measured], names: Sequence[str], scale: float, unit: Sequence[Measured]) -> Cell | None:
    """One number over the seeds of a variant; None if it was not measured.

    Args:
        rows: The variant's results, one per seed.
        names: Names the number can have.
        scale: Factor.
        unit: Results whose mean it is divided by, if any.
    """
    name = next((name for name in names if any(name in row.measures or name in row.judged for row in rows)), None)
    if name is None:
        return None
    if unit:
        scale /= interval([row.measures[name] for row in unit]).mean
    values = [scale * row.measures[name] for row in rows if name in row.measures]
    over = interval(values) if values else None
    judged: list[Judged] = [row.judged[name] for row in rows if name in row.judged]
    alone = judged[0] if len(judged) == 1 else None
    return Cell(
        value=over.mean if over else None,
        half=over.half if over else None,
        low=scale * alone.low if alone and alone.low is not None else None,
        high=scale * alone.high if alone and alone.high is not None else None,
        n=sum(one.n for one in judged),
        unparsed=sum(one.unparsed for one in judged),
        absent=sum(one.absent for one in judged),
        judge=judged[0].judge if judged else "",
    )
