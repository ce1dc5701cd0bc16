"""An evaluation as the tables of the page: the headline tables, and metrics by technique, type and kind."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from mote.chains.judge import COMPLIANCE, FULL_REFUSAL, PARTIAL_REFUSAL, JudgeCard
from mote.evals.attacks import load_techniques
from mote.evals.results import Number
from mote.report.evaluation import TOKENS, Evaluation, Headline
from mote.report.metric_labels import is_safety

_CLASSES = (COMPLIANCE, PARTIAL_REFUSAL, FULL_REFUSAL)


class Column(NamedTuple):
    """A metric of a task, and who judged it."""

    task: str
    metric: str
    judge: JudgeCard | None


class Board(NamedTuple):
    """A headline table: a column a metric, a row a system and mode; None where one was not measured."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[tuple[tuple[str, str], Sequence[Headline | None]]]


class Grid(NamedTuple):
    """One metric over groups: a row a group, a column a system and mode."""

    metric: str
    columns: Sequence[tuple[str, str]]
    rows: Sequence[tuple[str, Sequence[Number | None]]]


def boards(evaluation: Evaluation) -> list[Board]:
    """The headline tables that have something to say: safety and over-refusal, then help, quality and ability."""
    columns = list(dict.fromkeys(Column(one.task, one.metric, one.judge) for one in evaluation.headline))
    cost = [column for column in columns if column.metric == TOKENS]
    parts = {
        "Safety and over-refusal" if evaluation.harm_judged else "Refusal and over-refusal": [
            column for column in columns if is_safety(column.metric)
        ],
        "Helpfulness, quality and ability": [
            column for column in columns if not is_safety(column.metric) and column not in cost
        ],
    }
    found = {(one.task, one.metric, one.system, one.mode): one for one in evaluation.headline}
    return [
        Board(
            title,
            [*its, *cost],
            [(name, [found.get((c.task, c.metric, *name)) for c in (*its, *cost)]) for name in evaluation.columns],
        )
        for title, its in parts.items()
        if its
    ]


def by_technique(evaluation: Evaluation) -> list[tuple[str, Grid]]:
    """Kind of technique -> what was measured under each technique of it; `cached` ones come from a file."""
    kinds = {technique.name: technique.kind for technique in load_techniques()}
    numbers = [number for number in evaluation.groups if number.task == "strongreject"]

    def kind_of(technique: str) -> str:
        return "cached" if technique.startswith("cached_") else kinds.get(technique, "own")

    order = list(dict.fromkeys([*kinds, *sorted({number.group for number in numbers} - kinds.keys())]))
    grid = _grid(numbers, order, evaluation.columns)
    found: dict[str, list[tuple[str, Sequence[Number | None]]]] = {}
    for row in grid.rows:
        found.setdefault(kind_of(row[0]), []).append(row)
    return [(kind, grid._replace(rows=rows)) for kind, rows in found.items()]


def by_type(evaluation: Evaluation) -> list[Grid]:
    """XSTest by type of prompt: compliance on the safe ones, refusal of the unsafe ones."""
    numbers = [n for n in evaluation.groups if n.task == "xstest" and n.metric not in _CLASSES]
    return [
        _grid(its, sorted({number.group for number in its}), evaluation.columns)
        for metric in dict.fromkeys(number.metric for number in numbers)
        if (its := [number for number in numbers if number.metric == metric])
    ]


def class_shares(evaluation: Evaluation) -> dict[str, dict[tuple[str, str], dict[str, float]]]:
    """Kind of prompt -> system and mode -> class -> share of the answers of XSTest."""
    found: dict[str, dict[tuple[str, str], dict[str, float]]] = {}
    for number in evaluation.groups:
        if number.task == "xstest" and number.metric in _CLASSES and number.estimate.value is not None:
            of_kind = found.setdefault(number.group, {})
            of_kind.setdefault((number.system, number.mode), {})[number.metric] = number.estimate.value
    return {
        kind: {name: shares[name] for name in evaluation.columns if name in shares} for kind, shares in found.items()
    }


def _grid(numbers: Sequence[Number], order: Iterable[str], columns: Sequence[tuple[str, str]]) -> Grid:
    cells = {(number.group, number.system, number.mode): number for number in numbers}
    there = [name for name in columns if any((number.system, number.mode) == name for number in numbers)]
    groups = [group for group in order if any(number.group == group for number in numbers)]
    return Grid(
        numbers[0].metric if numbers else "",
        there,
        [(group, [cells.get((group, *name)) for name in there]) for group in groups],
    )
