"""The comparison of two reports as an HTML page and a JSON file."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mote.core.files import write_atomic, write_json
from mote.report import pages
from mote.report.compare import Compared, TwoReports, compare
from mote.report.metric_labels import metric_label

_TITLES = {"chains": "Chains", "training": "Training", "answers": "Tokens of the answers outside the evaluation"}


class Section(NamedTuple):
    """One metric of a task, or all metrics of a part of the runs."""

    title: str
    meaning: str
    rows: Sequence[Compared]


def write_comparison(first: Path, second: Path, out: Path) -> Path:
    """Write the page that compares two reports, and a JSON file of the same name beside it.

    Returns:
        Path of the JSON file.

    Raises:
        UserError: One of the two holds no report.
        MoteError: A file cannot be written.
    """
    comparison = compare(first, second)
    write_atomic(out, render(comparison))
    write_json(out.with_suffix(".json"), comparison.model_dump(mode="json"))
    return out.with_suffix(".json")


def render(comparison: TwoReports) -> str:
    """The comparison as one HTML page; deterministic."""
    return pages.render(
        "compare.html.j2",
        styles=("report.css.j2", "eval.css.j2"),
        scripts=(),
        comparison=comparison,
        sections=_sections(comparison),
    )


def _sections(comparison: TwoReports) -> list[Section]:
    sections = []
    for key in dict.fromkeys(_section_key(row) for row in comparison.numbers):
        part, task, metric = key
        rows = [row for row in comparison.numbers if _section_key(row) == key]
        label = metric_label(metric)
        title = label.title + (f" ({task})" if task else "") if metric else _TITLES[part]
        sections.append(Section(title, label.meaning if metric else "", rows))
    return sections


def _section_key(row: Compared) -> tuple[str, str, str]:
    """Part, task and metric of a row's section; outside the evaluation a part is one section."""
    return (row.part, row.task, row.metric) if row.part == "evaluation" else (row.part, "", "")
