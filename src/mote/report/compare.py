"""Two reports side by side: what differs between them, both numbers of everything, and differences with intervals.

Differences are paired where the same prompts were answered in both runs; numbers of different judges are not
subtracted.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mote.chains.judge import JudgeCard
from mote.core.errors import UserError, first_line
from mote.core.records import Frozen
from mote.evals.metrics import headline_scores
from mote.evals.results import EvalRow
from mote.evals.statistics import Estimate, paired, share
from mote.report.evaluation import Headline, token_scores
from mote.report.summary import Report, summarise


class Differing(BaseModel):
    """A fact that differs between the two reports.

    Attributes:
        what: Dotted name of a setting, judge, system, version or file.
        first: Its value in A; empty if A has none.
        second: Its value in B; empty if B has none.
    """

    model_config = ConfigDict(frozen=True)

    what: str
    first: str
    second: str


def differing(first: Report, second: Report) -> Iterator[Differing]:
    """All facts that are not the same in both, by dotted names."""
    a, b = _facts(first), _facts(second)
    for what in dict.fromkeys([*a, *b]):
        if a.get(what) != b.get(what):
            yield Differing(what=what, first=a.get(what, ""), second=b.get(what, ""))


def _facts(report: Report) -> dict[str, str]:
    """All that should be the same where only one thing was changed, by dotted names."""
    tree: dict[str, Any] = {"model": report.model, "scheme": report.scheme, "seed": report.seed}
    tree |= {"recipe": report.settings, "environment": report.environment, "files": report.files}
    if report.evaluation:
        its = report.evaluation
        tree["judge"] = {f"{card.name} ({card.measures})": card.model_dump(exclude={"measures"}) for card in its.judges}
        tree["system"] = {system.name: system.model_dump(exclude={"name"}) for system in its.systems}
        tree["evaluation"] = {"suite": its.settings or its.suite, "seed": its.seed, "limit": its.limit, "k": its.k}
        tree["evaluation"]["environment"] = its.environment
    return dict(_flat(tree))


def _flat(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        elif value is not None:
            yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


Key = tuple[str, str, str, str]  # task, metric, system, mode
Scores = dict[str, float]


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
        p: Two-sided p value of paired differences.
        method: `mcnemar` or `paired bootstrap` on the same prompts; `independent`: from the two intervals; `none`.
        n: Prompts of a paired difference.
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
        system: Name of the system, where there is one.
        mode: Mode it answered in.
        first: The number of the first report.
        second: The number of the second one.
        judges: Card of the judge of each.
        unparsed: Verdicts of each that could not be read.
        difference: Second minus first.
        note: Why nothing was subtracted, or why the difference is not paired.
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
        differs: What is not the same in both.
        numbers: The numbers of both.
    """

    first: Side
    second: Side
    differs: tuple[Differing, ...]
    numbers: tuple[Compared, ...]


def read_report(source: Path) -> Report:
    """The report of a run folder, counted anew, or one that was written to a `report.json`.

    Raises:
        UserError: There is none, or it is damaged.
    """
    if source.is_dir():
        return summarise(source)
    try:
        return Report.model_validate_json(source.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"report: {source} does not exist; give a run folder or a report.json") from error
    except (OSError, ValidationError) as error:
        raise UserError(
            f"report: {source} is no report.json of this version ({first_line(error)}); give the run folder"
        ) from error


def compare(first: Path, second: Path) -> TwoReports:
    """Compare two run folders or report.json files.

    Raises:
        UserError: One of them holds no report.
    """
    reports = read_report(first), read_report(second)
    return TwoReports(
        first=Side(source=str(first), name=reports[0].name, model=reports[0].model),
        second=Side(source=str(second), name=reports[1].name, model=reports[1].model),
        differs=tuple(differing(*reports)),
        numbers=(*_evaluations(*reports), *_chains(*reports), *_training(*reports), *_answers(*reports)),
    )


# --- numbers of the evaluations


def _evaluations(first: Report, second: Report) -> Iterator[Compared]:
    a, b = ({_key(one): one for one in r.evaluation.headline} if r.evaluation else {} for r in (first, second))
    scores = _scores(first), _scores(second)
    same_techniques = _techniques(first) == _techniques(second)
    for key in dict.fromkeys([*a, *b]):
        one, other = a.get(key), b.get(key)
        difference, note = None, ""
        if one and other:
            if one.judge != other.judge:
                note = "not subtracted: the judges are not the same"
            elif "@" in key[1] and not same_techniques:
                note = "not subtracted: the techniques are not the same"
            else:
                pair = [of_run[key] if of_run else None for of_run in scores]
                difference, note = _difference(one.estimate, other.estimate, pair[0], pair[1])
        yield Compared(
            part="evaluation",
            task=key[0],
            metric=key[1],
            system=key[2],
            mode=key[3],
            first=one.estimate if one else None,
            second=other.estimate if other else None,
            judges=(one.judge if one else None, other.judge if other else None),
            unparsed=(one.unparsed if one else 0, other.unparsed if other else 0),
            difference=difference,
            note=note,
        )


def _key(one: Headline) -> Key:
    return one.task, one.metric, one.system, one.mode


def _techniques(report: Report) -> set[str]:
    groups = report.evaluation.groups if report.evaluation else ()
    return {number.group for number in groups if number.task == "strongreject"}


def _scores(report: Report) -> dict[Key, Scores] | None:
    """Every headline metric prompt by prompt, None of a report without its rows; a prompt is its id and its text."""
    if not report.evaluation or not report.judged:
        return None
    found: dict[Key, Scores] = {}
    for one in headline_scores(report.judged, report.evaluation.k):
        text = {row.id: row.question for row in one.rows}
        found[one[:4]] = {f"{id_}\0{text[id_]}": value for id_, value in one.scores.items()}
    for (system, mode), spent in _tokens(report.judged).items():
        found["", "tokens", system, mode] = spent
    return found


def _tokens(rows: Sequence[EvalRow]) -> dict[tuple[str, str], Scores]:
    shown = {f"{row.task}/{row.technique}/{row.id}": row.prompt for row in rows}
    return {
        name: {f"{key}\0{shown[key]}": tokens for key, tokens in of_name.items()}
        for name, of_name in token_scores(rows).items()
    }


def _difference(first: Estimate, second: Estimate, a: Scores | None, b: Scores | None) -> tuple[Difference | None, str]:
    """Paired where both have prompts in common, else from the two intervals, as if the runs were independent."""
    if a is not None and b is not None and a.keys() & b.keys():
        found = paired(a, b)
        assert found.difference is not None
        difference = Difference(
            value=found.difference, low=found.low, high=found.high, p=found.p, method=found.test, n=found.n
        )
        return difference, "" if a.keys() == b.keys() else "on the prompts that both answered"
    note = "no prompt in common" if a is not None and b is not None else "not paired: a report.json holds no answers"
    return independent(first, second), note


def independent(first: Estimate, second: Estimate) -> Difference | None:
    """The difference of two independent numbers, its interval from theirs (Zou and Donner 2008); None without both.

    Where one has no interval, the difference has none.
    """
    if first.value is None or second.value is None:
        return None
    value = second.value - first.value
    ends = first.low, first.high, second.low, second.high
    if None in ends:
        return Difference(value=value, low=None, high=None, p=None, method="none", n=0)
    low = value - math.hypot(second.value - (second.low or 0), (first.high or 0) - first.value)
    high = value + math.hypot((second.high or 0) - second.value, first.value - (first.low or 0))
    return Difference(value=value, low=low, high=high, p=None, method="independent", n=0)


# --- numbers of the runs


def _chains(first: Report, second: Report) -> Iterator[Compared]:
    sides = [
        {
            "accepted": _counted(report.chains.accepted, report.chains.total),
            **{
                f"with {step}": _counted(round(part * report.chains.accepted), report.chains.accepted)
                for step, part in report.chains.shares.items()
            },
        }
        if report.chains
        else {}
        for report in (first, second)
    ]
    yield from _plain("chains", *sides)


def _training(first: Report, second: Report) -> Iterator[Compared]:
    sides = [
        {f"loss, held out: {name}": _single(loss) for name, loss in report.training.held_out.items()}
        if report.training
        else {}
        for report in (first, second)
    ]
    yield from _plain("training", *sides)


def _answers(first: Report, second: Report) -> Iterator[Compared]:
    sides = [{(row.system, row.mode): _single(row.mean_tokens) for row in report.answers} for report in (first, second)]
    for system, mode in dict.fromkeys([*sides[0], *sides[1]]):
        one, other = (side.get((system, mode)) for side in sides)
        yield _row("answers", "tokens", one, other, system, mode)


def _plain(part: str, a: Mapping[str, Estimate], b: Mapping[str, Estimate]) -> Iterator[Compared]:
    for metric in dict.fromkeys([*a, *b]):
        yield _row(part, metric, a.get(metric), b.get(metric))


def _row(
    part: str, metric: str, one: Estimate | None, other: Estimate | None, system: str = "", mode: str = ""
) -> Compared:
    return Compared(
        part=part,
        task="",
        metric=metric,
        system=system,
        mode=mode,
        first=one,
        second=other,
        judges=(None, None),
        unparsed=(0, 0),
        difference=independent(one, other) if one and other else None,
        note="",
    )


def _counted(part: int, whole: int) -> Estimate:
    return share([1.0] * part + [0.0] * (whole - part))


def _single(value: float) -> Estimate:
    """A number that was measured once."""
    return Estimate(value=value, low=None, high=None, n=1, method="none")
