"""Writes `report.json` and the self-contained page `report.html` from the summary of a run."""

from pathlib import Path
from typing import Any

from markupsafe import Markup

from mote.chains.stats import PAPER_SHARES, in_order
from mote.core.files import write_atomic, write_json
from mote.report import eval_plots, pages, plots
from mote.report.contents import Report
from mote.report.evaluation import Evaluation
from mote.report.metric_labels import is_safety, metric_label
from mote.report.sample import as_rows, draw_sample
from mote.report.summary import summarise
from mote.report.tables import by_technique, by_type, class_shares, headline_tables

SHOWN = 500  # questions shown side by side; a page with more is slow to open


def write_report(folder: Path) -> dict[str, Any]:
    """Write `report.json` and `report.html` into a run folder.

    Args:
        folder: The run folder; any of its files may be missing.

    Returns:
        The content of `report.json`: always the same keys, None or empty for missing parts.

    Raises:
        UserError: The folder holds no part of a run, or one of its files is damaged.
        MoteError: The report cannot be written.
    """
    report = summarise(folder)
    content = report.model_dump(mode="json")
    write_atomic(folder / "report.html", render(report))
    write_json(folder / "report.json", content)
    return content


def render(report: Report) -> str:
    """The report as one HTML page; deterministic."""
    return pages.render(
        "report.html.j2",
        styles=("report.css.j2", "browse.css.j2", "eval.css.j2"),
        scripts=("browse.js.j2", "report.js.j2", "judged.js.j2"),
        report=report,
        plots={name: Markup(svg) for name, svg in _plots(report).items()},
        paper=PAPER_SHARES,
        shown=SHOWN,
        labels=_labels(report),
        steps=in_order(tuple(row.tokens) for row in report.answers),
        metric_label=metric_label,
        **_evaluation_values(report),
    )


def _plots(report: Report) -> dict[str, str]:
    drawn = {}
    if report.chains and report.chains.shares:
        drawn["shares"] = plots.shares(report.chains.shares, PAPER_SHARES)
    if report.training and (report.training.curve or report.training.held_out_curve):
        drawn["losses"] = plots.losses(report.training.curve, report.training.held_out_curve)
    if report.answers:
        bars = [row.tokens | {"outside steps": row.tokens_of_no_step} for row in report.answers]
        drawn["tokens"] = plots.tokens(dict(zip(_labels(report), bars, strict=True)))
    return drawn


def _evaluation_values(report: Report) -> dict[str, Any]:
    """Template variables of the evaluation part; empty without an evaluation."""
    evaluation = report.evaluation
    if evaluation is None:
        return {"curves": [], "classes": [], "boards": [], "techniques": [], "types": [], "sample": None, "rows": []}
    drawn = draw_sample(report.judged, evaluation.columns)
    return {
        "curves": [Markup(svg) for svg in _curves(evaluation)],
        "classes": [Markup(svg) for svg in _classes(evaluation)],
        "boards": headline_tables(evaluation),
        "techniques": by_technique(evaluation),
        "types": by_type(evaluation),
        "sample": drawn,
        "rows": {
            "columns": [" · ".join(column) for column in evaluation.columns],
            "systems": [system for system, _ in evaluation.columns],
            "prompts": as_rows(drawn),
        },
    }


def _curves(evaluation: Evaluation) -> list[str]:
    systems = [system.name for system in evaluation.systems]
    metrics = dict.fromkeys((point.task, point.metric) for point in evaluation.curve if is_safety(point.metric))
    return [
        eval_plots.curve(
            [point for point in evaluation.curve if (point.task, point.metric) == (task, metric)],
            systems,
            f"curve{number}",
            f"{metric_label(metric).title} ({task})",
            rated=False,
        )
        for number, (task, metric) in enumerate(metrics)
    ]


def _classes(evaluation: Evaluation) -> list[str]:
    titles = {"benign": "Safe prompts", "harmful": "Unsafe prompts"}
    return [
        eval_plots.classes(
            {" · ".join(column): of_column for column, of_column in shares.items()},
            f"classes-{task}-{kind}",
            f"{titles.get(kind, kind)} ({task})",
        )
        for (task, kind), shares in class_shares(evaluation).items()
    ]


def _labels(report: Report) -> list[str]:
    """Labels of the answer columns: the mode, with the system if there are several."""
    several = len({row.system for row in report.answers}) > 1
    return [f"{row.system} · {row.mode}" if several else row.mode for row in report.answers]
