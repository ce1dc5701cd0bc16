"""Two reports as one page and one JSON file."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mote.core.files import write_atomic, write_json
from mote.report import pages
from mote.report.compare import Compared, TwoReports, compare
from mote.report.metric_labels import named

_TITLES = {"chains": "Chains", "training": "Training", "answers": "Tokens of the answers that were not judged"}


class Section(NamedTuple):
    """The numbers of one metric of a task, or of a part of the runs."""

    title: str
    meaning: str
    rows: Sequence[Compared]


def write_comparison(first: Path, second: Path, out: Path) -> Path:
    """Write the page of two reports, and beside it a JSON file of the same name; returns the JSON file's path.

    Raises:
        UserError: One of the two holds no report.
        MoteError: The disk refused a file.
    """
    found = compare(first, second)
    write_atomic(out, render(found))
    write_json(out.with_suffix(".json"), found.model_dump(mode="json"))
    return out.with_suffix(".json")


def render(found: TwoReports) -> str:
    """Two reports as one HTML page; the same two give the same page."""
    return pages.render(
        "compare.html.j2",
        styles=("report.css.j2", "eval.css.j2"),
        scripts=(),
        found=found,
        sections=_sections(found),
        named=named,
    )


def _sections(found: TwoReports) -> list[Section]:
    sections = []
    for part, task, metric in dict.fromkeys(_where(row) for row in found.numbers):
        rows = [row for row in found.numbers if _where(row) == (part, task, metric)]
        its = named(metric)
        title = its.title + (f" ({task})" if task else "") if metric else _TITLES[part]
        sections.append(Section(title, its.meaning if metric else "", rows))
    return sections


def _where(row: Compared) -> tuple[str, str, str]:
    """What a row's section is about: a metric of the evaluation, or a part of the run with all its metrics."""
    return (row.part, row.task, row.metric) if row.part == "evaluation" else (row.part, "", "")
