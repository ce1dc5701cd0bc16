"""Compares two reports: settings that differ, all numbers side by side, and their differences with intervals.

Differences are paired if both runs answered the same prompts; numbers of different judges are not subtracted.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mote.chains.judge import JudgeCard
from mote.core.errors import UserError, first_line
from mote.core.records import Frozen
from mote.evals.attacks import UNDER_TECHNIQUES
from mote.evals.metrics import headline_scores
from mote.evals.results import EvalRow
from mote.evals.statistics import Estimate, paired, share
from mote.report.contents import Report
from mote.report.evaluation import Headline, token_scores
from mote.report.summary import summarise

Key = tuple[str, str, str, str]  # task, metric, system, mode
Scores = dict[str, float]  # prompt -> value


class Differing(Frozen):
    """A fact that differs between the two reports.

    Attributes:
        what: Dotted name of a setting, judge, system, version or file.
        first: Its value in A; empty if A has none.
        second: Its value in B; empty if B has none.
    """

    what: str
    first: str
    second: str


class Side(Frozen):
    """One of the two reports.

    Attributes:
        source: Folder or file it was read from.
        name: Name of the run.
        model: Base model.
    """

    source: str
    name: str
    model: str | None


class Difference(Frozen):
    """The second number minus the first.

    Attributes:
        value: The difference.
        low: Lower end of its 95 % interval.
        high: Upper end.
        p: Two-sided p value of a paired difference.
        method: `mcnemar` or `paired bootstrap` on the same prompts; `independent`: from the two intervals; `none`.
        n: Number of paired prompts.
    """

    value: float
    low: float | None
    high: float | None
    p: float | None
    method: str
    n: int


class Compared(Frozen):
    """One number of both reports.

    Attributes:
        part: `evaluation`, `chains`, `training` or `answers`.
        task: Task of an evaluation.
        metric: Name of the metric.
        system: Name of the system; empty for numbers of the whole run.
        mode: Mode it answered in.
        first: The number of the first report.
        second: The number of the second report.
        judges: Card of each report's judge.
        unparsed: Unparsed verdicts of each report.
        difference: Second minus first.
        note: Why there is no difference, or why it is not paired.
    """

    part: str
    task: str
    metric: str
    system: str
    mode: str
    first: Estimate | None
    second: Estimate | None
    judges: tuple[JudgeCard | None, JudgeCard | None]
    unparsed: tuple[int, int]
    difference: Difference | None
    note: str


class TwoReports(Frozen):
    """Two reports side by side.

    Attributes:
        first: A.
        second: B.
        differs: Facts that differ between the runs.
        numbers: The numbers of both.
    """

    first: Side
    second: Side
    differs: tuple[Differing, ...]
    numbers: tuple[Compared, ...]


def read_report(source: Path) -> Report:
    """Summarise a run folder, or read a `report.json`.

    Raises:
        UserError: The source does not exist or is damaged.
    """
    if source.is_dir():
        return summarise(source)
    try:
        return Report.model_validate_json(source.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"report: {source} does not exist; give a run folder or a report.json") from error
    except (OSError, ValidationError) as error:
        raise UserError(
            f"report: {source} is not a report.json of this version ({first_line(error)}); give the run folder"
        ) from error


def compare(first: Path, second: Path) -> TwoReports:
    """Compare two run folders or report.json files.

    Raises:
        UserError: One of them holds no report.
    """
    reports = (read_report(first), read_report(second))
    return TwoReports(
        first=Side(source=str(first), name=reports[0].name, model=reports[0].model),
        second=Side(source=str(second), name=reports[1].name, model=reports[1].model),
        differs=tuple(differing(*reports)),
        numbers=(
            *_compare_evaluations(*reports),
            *_compare_chains(*reports),
            *_compare_training(*reports),
            *_compare_answers(*reports),
        ),
    )


# --- settings, versions and files that differ


def differing(first: Report, second: Report) -> Iterator[Differing]:
    """The facts that differ between the runs, by dotted name."""
    a = _facts(first)
    b = _facts(second)
    for what in dict.fromkeys([*a, *b]):
        if a.get(what) != b.get(what):
            yield Differing(what=what, first=a.get(what, ""), second=b.get(what, ""))


def _facts(report: Report) -> dict[str, str]:
    """Settings, versions, judges and file hashes by dotted name; equal for a repeated run."""
    tree: dict[str, Any] = {"model": report.model, "scheme": report.scheme, "seed": report.seed}
    tree |= {"recipe": report.settings, "environment": report.environment, "files": report.files}
    if evaluation := report.evaluation:
        tree["judge"] = {
            f"{card.name} ({card.measures})": card.model_dump(exclude={"measures"}) for card in evaluation.judges
        }
        tree["system"] = {system.name: system.model_dump(exclude={"name"}) for system in evaluation.systems}
        tree["evaluation"] = {
            "suite": evaluation.settings or evaluation.suite,
            "seed": evaluation.seed,
            "limit": evaluation.limit,
            "k": evaluation.k,
            "environment": evaluation.environment,
        }
    return dict(_flatten(tree))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{name}.")
        elif value is not None:
            yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# --- numbers of the evaluations


def _compare_evaluations(first: Report, second: Report) -> Iterator[Compared]:
    headlines_a = _headlines(first)
    headlines_b = _headlines(second)
    scores_a = _scores(first)
    scores_b = _scores(second)
    for key in dict.fromkeys([*headlines_a, *headlines_b]):
        task, metric, system, mode = key
        a = headlines_a.get(key)
        b = headlines_b.get(key)
        difference = None
        note = ""
        if a and b:
            if a.judge != b.judge:
                note = "not subtracted: different judges"
            elif _techniques(first, task) != _techniques(second, task):
                note = "not subtracted: different techniques"
            else:
                difference, note = _difference(
                    a.estimate, b.estimate, scores_a[key] if scores_a else None, scores_b[key] if scores_b else None
                )
        yield Compared(
            part="evaluation",
            task=task,
            metric=metric,
            system=system,
            mode=mode,
            first=a.estimate if a else None,
            second=b.estimate if b else None,
            judges=(a.judge if a else None, b.judge if b else None),
            unparsed=(a.unparsed if a else 0, b.unparsed if b else 0),
            difference=difference,
            note=note,
        )


def _headlines(report: Report) -> dict[Key, Headline]:
    if not report.evaluation:
        return {}
    return {(h.task, h.metric, h.system, h.mode): h for h in report.evaluation.headline}


def _techniques(report: Report, task: str) -> set[str]:
    """The techniques of a task; empty for one without."""
    groups = report.evaluation.groups if report.evaluation and task in UNDER_TECHNIQUES else ()
    return {number.group for number in groups if number.task == task}


def _scores(report: Report) -> dict[Key, Scores] | None:
    """Every headline metric per prompt (id and text), None for a report without result rows."""
    if not report.evaluation or not report.judged:
        return None
    scores: dict[Key, Scores] = {}
    for one in headline_scores(report.judged, report.evaluation.k):
        text = {row.id: row.question for row in one.rows}
        scores[one[:4]] = {f"{id_}\0{text[id_]}": value for id_, value in one.scores.items()}
    for (system, mode), tokens in _tokens(report.judged).items():
        scores["", "tokens", system, mode] = tokens
    return scores


def _tokens(rows: Sequence[EvalRow]) -> dict[tuple[str, str], Scores]:
    """(system, mode) -> prompt (id and text) -> tokens of its answer."""
    prompts = {f"{row.task}/{row.technique}/{row.id}": row.prompt for row in rows}
    return {
        system_and_mode: {f"{key}\0{prompts[key]}": count for key, count in tokens.items()}
        for system_and_mode, tokens in token_scores(rows).items()
    }


def _difference(first: Estimate, second: Estimate, a: Scores | None, b: Scores | None) -> tuple[Difference | None, str]:
    """Paired on the common prompts, else from the two intervals as for independent runs; with a note."""
    if a is not None and b is not None and a.keys() & b.keys():
        result = paired(a, b)
        assert result.difference is not None
        difference = Difference(
            value=result.difference, low=result.low, high=result.high, p=result.p, method=result.test, n=result.n
        )
        return difference, "" if a.keys() == b.keys() else "on the prompts that both answered"
    note = "no prompt in common" if a is not None and b is not None else "not paired: a report.json holds no answers"
    return independent(first, second), note


def independent(first: Estimate, second: Estimate) -> Difference | None:
    """Difference of two independent numbers, its interval from theirs (Zou and Donner 2008).

    None if a value is missing; without an interval if one of the numbers has none.
    """
    if first.value is None or second.value is None:
        return None
    value = second.value - first.value
    if first.low is None or first.high is None or second.low is None or second.high is None:
        return Difference(value=value, low=None, high=None, p=None, method="none", n=0)
    low = value - math.hypot(second.value - second.low, first.high - first.value)
    high = value + math.hypot(second.high - second.value, first.value - first.low)
    return Difference(value=value, low=low, high=high, p=None, method="independent", n=0)


# --- numbers of the runs


def _compare_chains(first: Report, second: Report) -> Iterator[Compared]:
    yield from _compare_numbers("chains", _chain_numbers(first), _chain_numbers(second))


def _chain_numbers(report: Report) -> dict[str, Estimate]:
    if not report.chains:
        return {}
    accepted = report.chains.accepted
    numbers = {"accepted": _share_of(accepted, report.chains.total)}
    for step, share_with_step in report.chains.shares.items():
        numbers[f"with {step}"] = _share_of(round(share_with_step * accepted), accepted)
    return numbers


def _compare_training(first: Report, second: Report) -> Iterator[Compared]:
    yield from _compare_numbers("training", _training_numbers(first), _training_numbers(second))


def _training_numbers(report: Report) -> dict[str, Estimate]:
    if not report.training:
        return {}
    return {f"loss, held out: {name}": _single(loss) for name, loss in report.training.held_out.items()}


def _compare_answers(first: Report, second: Report) -> Iterator[Compared]:
    a = {(row.system, row.mode): _single(row.mean_tokens) for row in first.answers}
    b = {(row.system, row.mode): _single(row.mean_tokens) for row in second.answers}
    for key in dict.fromkeys([*a, *b]):
        yield _compared("answers", "tokens", a.get(key), b.get(key), *key)


def _compare_numbers(part: str, a: Mapping[str, Estimate], b: Mapping[str, Estimate]) -> Iterator[Compared]:
    for metric in dict.fromkeys([*a, *b]):
        yield _compared(part, metric, a.get(metric), b.get(metric))


def _compared(
    part: str, metric: str, first: Estimate | None, second: Estimate | None, system: str = "", mode: str = ""
) -> Compared:
    return Compared(
        part=part,
        task="",
        metric=metric,
        system=system,
        mode=mode,
        first=first,
        second=second,
        judges=(None, None),
        unparsed=(0, 0),
        difference=independent(first, second) if first and second else None,
        note="",
    )


def _share_of(part: int, whole: int) -> Estimate:
    return share([1.0] * part + [0.0] * (whole - part))


def _single(value: float) -> Estimate:
    """A number measured once."""
    return Estimate(value=value, low=None, high=None, n=1, method="none")
