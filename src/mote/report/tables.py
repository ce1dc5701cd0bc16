"""The tables of the evaluation page: headline metrics, and metrics by technique, type and kind."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from mote.chains.judge import COMPLIANCE, FULL_REFUSAL, PARTIAL_REFUSAL, JudgeCard
from mote.evals.attacks import UNDER_TECHNIQUES, load_techniques
from mote.evals.metrics import OVER_REFUSAL, UNREADABLE
from mote.evals.results import Number
from mote.report.evaluation import TOKENS, Evaluation, Headline
from mote.report.metric_labels import is_safety

_CLASSES = (COMPLIANCE, PARTIAL_REFUSAL, FULL_REFUSAL)
SystemMode = tuple[str, str]
GroupRow = tuple[str, Sequence[Number | None]]  # of a technique, type or kind


class Column(NamedTuple):
    """A metric of a task and its judge."""

    task: str
    metric: str
    judge: JudgeCard | None


class HeadlineTable(NamedTuple):
    """One column per metric, one row per system and mode; None if the metric was not measured."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[tuple[SystemMode, Sequence[Headline | None]]]


class GroupTable(NamedTuple):
    """One metric by group: one row per group, one column per system and mode."""

    metric: str
    columns: Sequence[SystemMode]
    rows: Sequence[GroupRow]


class TechniqueTable(NamedTuple):
    """One metric by technique; `kinds` has the rows by kind of technique, `cached` ones come from a file of attacks."""

    task: str
    table: GroupTable
    kinds: Sequence[tuple[str, Sequence[GroupRow]]]


def headline_tables(evaluation: Evaluation) -> list[HeadlineTable]:
    """The headline tables that have metrics: safety and over-refusal, then help, quality and ability."""
    columns = list(dict.fromkeys(Column(one.task, one.metric, one.judge) for one in evaluation.headline))
    cost = [column for column in columns if column.metric == TOKENS]
    safety = [column for column in columns if is_safety(column.metric) or column.metric == UNREADABLE]
    other = [column for column in columns if column not in safety and column not in cost]
    headlines = {(one.task, one.metric, one.system, one.mode): one for one in evaluation.headline}
    tables = []
    for title, metrics in (
        ("Safety and over-refusal" if evaluation.harm_judged else "Refusal and over-refusal", safety),
        ("Helpfulness, quality and ability", other),
    ):
        if metrics:
            shown = [*metrics, *cost]
            rows = [
                (system_mode, [headlines.get((column.task, column.metric, *system_mode)) for column in shown])
                for system_mode in evaluation.columns
            ]
            tables.append(HeadlineTable(title, shown, rows))
    return tables


def by_technique(evaluation: Evaluation) -> list[TechniqueTable]:
    """The metrics of disguised prompts by technique, one table per task and metric."""
    kinds = {technique.name: technique.kind for technique in load_techniques()}
    tables = []
    for (task, _), numbers in _by_metric(evaluation, UNDER_TECHNIQUES).items():
        order = list(dict.fromkeys([*kinds, *sorted({number.group for number in numbers} - kinds.keys())]))
        table = _group_table(numbers, order, evaluation.columns)
        by_kind: dict[str, list[GroupRow]] = {}
        for row in table.rows:
            kind = "cached" if row[0].startswith("cached_") else kinds.get(row[0], "own")
            by_kind.setdefault(kind, []).append(row)
        tables.append(TechniqueTable(task, table, list(by_kind.items())))
    return tables


def by_type(evaluation: Evaluation) -> list[tuple[str, GroupTable]]:
    """(task, table) of XSTest and JailbreakBench by type: compliance with safe prompts, refusal of unsafe ones."""
    return [
        (task, _group_table(numbers, sorted({number.group for number in numbers}), evaluation.columns))
        for (task, metric), numbers in _by_metric(evaluation, OVER_REFUSAL).items()
        if metric not in _CLASSES
    ]


def class_shares(evaluation: Evaluation) -> dict[tuple[str, str], dict[SystemMode, dict[str, float]]]:
    """(task, kind of prompt) -> system and mode -> class -> share of the answers."""
    by_kind: dict[tuple[str, str], dict[SystemMode, dict[str, float]]] = {}
    for number in evaluation.groups:
        if number.task in OVER_REFUSAL and number.metric in _CLASSES and number.estimate.value is not None:
            shares = by_kind.setdefault((number.task, number.group), {}).setdefault((number.system, number.mode), {})
            shares[number.metric] = number.estimate.value
    return {
        task_and_kind: {column: shares[column] for column in evaluation.columns if column in shares}
        for task_and_kind, shares in by_kind.items()
    }


def _by_metric(evaluation: Evaluation, tasks: Sequence[str]) -> dict[tuple[str, str], list[Number]]:
    """(task, metric) -> its numbers by group, of the given tasks."""
    by_metric: dict[tuple[str, str], list[Number]] = {}
    for number in evaluation.groups:
        if number.task in tasks:
            by_metric.setdefault((number.task, number.metric), []).append(number)
    return by_metric


def _group_table(numbers: Sequence[Number], order: Iterable[str], columns: Sequence[SystemMode]) -> GroupTable:
    cells = {(number.group, number.system, number.mode): number for number in numbers}
    present = {(number.system, number.mode) for number in numbers}
    shown = [column for column in columns if column in present]
    groups_present = {number.group for number in numbers}
    return GroupTable(
        metric=numbers[0].metric if numbers else "",
        columns=shown,
        rows=[(group, [cells.get((group, *column)) for column in shown]) for group in order if group in groups_present],
    )
