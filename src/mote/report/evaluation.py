"""The evaluation part of a report: headline table, curves, and judges' agreement with human labels.

Reads `evals/` of a run folder, the files of `mote eval`; independent of the pages.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mote.chains.judge import JudgeCard
from mote.core.errors import UserError, first_line
from mote.core.recipe import DEFAULT_MODES
from mote.core.records import Frozen, read_rows
from mote.evals.judges.agreement import AgreementReport
from mote.evals.metrics import MetricScores, headline_scores
from mote.evals.results import Comparison, Cost, EvalRow, Number, Summary, System
from mote.evals.statistics import Estimate, Paired, mean, paired

TOKENS = "tokens"  # metric: tokens per answer, over all tasks
_Model = TypeVar("_Model", bound=BaseModel)


class Headline(Frozen):
    """One number of the headline table, with its judge and its difference to the base model.

    Attributes:
        task: Task; empty for `tokens`, which is over all tasks.
        metric: Name of the metric.
        system: Name of the system.
        mode: Mode it answered in.
        judge: Card of the judge; none for `tokens`.
        estimate: The number.
        unparsed: Unparsed verdicts.
        absent: Answers without the step to be judged.
        against: System and mode it is compared with; none for the reference itself.
        difference: Difference to the reference on the same prompts.
    """

    task: str
    metric: str
    system: str
    mode: str
    judge: JudgeCard | None
    estimate: Estimate
    unparsed: int
    absent: int
    against: str | None
    difference: Paired | None


class Point(Frozen):
    """A point of a curve: a headline metric against tokens per answer (figure 6).

    Attributes:
        task: Task.
        metric: Headline metric.
        system: Name of the system.
        mode: Mode, with its explicit budget if it has one (`full@64`).
        tokens: Tokens per answer, over the answers of the metric.
        score: The metric.
    """

    task: str
    metric: str
    system: str
    mode: str
    tokens: Estimate
    score: Estimate


class Evaluation(Frozen):
    """Results of `mote eval`.

    Attributes:
        suite: Name of the suite.
        command: Command line that made it.
        seed: Seed of sampling and resampling.
        limit: Maximum number of questions per task; null for all.
        k: Fraction of the jailbreak techniques in goodness@k.
        answers: Number of judged answers.
        settings: The suite and the arguments of each task, as in `suite.json`.
        systems: The systems that answered.
        judges: The card of every judge.
        agreement: How far these judges (same revision and prompt) agree with people, as far as measured.
        headline: The headline table, by task, metric, system and mode.
        groups: The same metrics by technique, by type and by kind.
        curve: Headline metrics against tokens.
        costs: Tokens by system and mode.
        environment: Versions and machine of the evaluation.
    """

    suite: str
    command: str
    seed: int
    limit: int | None
    k: float
    answers: int
    settings: dict[str, Any]
    systems: tuple[System, ...]
    judges: tuple[JudgeCard, ...]
    agreement: tuple[AgreementReport, ...]
    headline: tuple[Headline, ...]
    groups: tuple[Number, ...]
    curve: tuple[Point, ...]
    costs: tuple[Cost, ...]
    environment: dict[str, Any]

    @property
    def columns(self) -> tuple[tuple[str, str], ...]:
        """(system, mode) pairs: systems in the order of the run, modes in their usual order."""
        return tuple((cost.system, cost.mode) for cost in self.costs)

    @property
    def harm_judged(self) -> bool:
        """Whether any judge measures harm; without one the page makes no claim about harm."""
        return any(card.measures in ("harm", "strongreject") for card in self.judges)


def read_evaluation(folder: Path) -> tuple[Evaluation, tuple[EvalRow, ...]] | None:
    """Read the evaluation of a run folder with its result rows; None without one.

    Raises:
        UserError: One of its files is damaged.
    """
    evals = folder / "evals"
    if not (evals / "summary.json").exists():
        return None
    summary = _read(evals / "summary.json", Summary)
    rows = tuple(read_rows(evals / "results.jsonl", EvalRow))
    agreements = [_read(path, AgreementReport) for path in sorted(evals.glob("agreement-*.json"))]
    return _build(summary, rows, agreements, _settings(evals / "suite.json")), rows


def _build(
    summary: Summary, rows: Sequence[EvalRow], agreements: Sequence[AgreementReport], settings: dict[str, Any]
) -> Evaluation:
    order = _order(summary.systems)
    scored = sorted(headline_scores(rows, summary.k), key=lambda one: (one.task, order(one.system, one.mode)))
    numbers = {(n.task, n.metric, n.system, n.mode): n for n in summary.numbers if not n.group}
    if numbers.keys() != {one[:4] for one in scored}:
        raise UserError(
            "report: evals/summary.json and evals/results.jsonl do not belong together; run `mote eval` again"
        )
    return Evaluation(
        suite=summary.suite,
        command=summary.command,
        seed=summary.seed,
        limit=summary.limit,
        k=summary.k,
        answers=len(rows),
        settings=settings,
        systems=tuple(summary.systems),
        judges=tuple(summary.judges),
        agreement=tuple(report for report in agreements if report.judge in summary.judges),
        headline=(*_judged_headlines(summary, numbers, scored), *_token_headlines(summary, rows, order)),
        groups=tuple(number for number in summary.numbers if number.group),
        curve=tuple(_point(one, numbers[one[:4]].estimate, summary.seed) for one in scored),
        costs=tuple(sorted(summary.costs, key=lambda cost: order(cost.system, cost.mode))),
        environment=summary.environment,
    )


def token_scores(rows: Sequence[EvalRow]) -> dict[tuple[str, str], dict[str, float]]:
    """(system, mode) -> prompt -> tokens of its answer."""
    scores: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        key = f"{row.task}/{row.technique}/{row.id}"
        scores.setdefault((row.system, row.mode), {})[key] = float(sum(row.tokens.values()))
    return scores


def mode_rank(mode: str) -> tuple[int, str, int]:
    """Sort key of modes: the usual order, modes of other schemes before `adaptive`, explicit budgets last."""
    name, _, budget = mode.partition("@")
    last = len(DEFAULT_MODES) - 1
    rank = DEFAULT_MODES.index(name) if name in DEFAULT_MODES[:-1] else last + (name == DEFAULT_MODES[-1])
    return rank, name, -int(budget) if budget.isdigit() else -(2**31)


def _order(systems: Sequence[System]) -> Callable[[str, str], tuple[int, tuple[int, str, int]]]:
    index = {system.name: number for number, system in enumerate(systems)}
    return lambda system, mode: (index.get(system, len(index)), mode_rank(mode))


def _judged_headlines(
    summary: Summary, numbers: Mapping[tuple[str, str, str, str], Number], scored: Sequence[MetricScores]
) -> list[Headline]:
    """The metrics over whole tasks, in the order of `scored`."""
    comparisons = {(c.task, c.metric, c.second): c for c in summary.comparisons}
    cards = {(card.name, card.measures): card for card in summary.judges}
    headlines = []
    for one in scored:
        number = numbers[one[:4]]
        comparison: Comparison | None = comparisons.get((one.task, one.metric, one.name))
        headlines.append(
            Headline(
                task=one.task,
                metric=one.metric,
                system=one.system,
                mode=one.mode,
                judge=cards[one.rows[0].judge, one.rows[0].measures],
                estimate=number.estimate,
                unparsed=number.unparsed,
                absent=number.absent,
                against=comparison.first if comparison else None,
                difference=comparison.result if comparison else None,
            )
        )
    return headlines


def _token_headlines(summary: Summary, rows: Sequence[EvalRow], order: Callable[[str, str], Any]) -> list[Headline]:
    """Tokens per answer, over all tasks."""
    tokens = token_scores(rows)
    names = sorted(tokens, key=lambda name: order(*name))
    reference = names[0]
    return [
        Headline(
            task="",
            metric=TOKENS,
            system=system,
            mode=mode,
            judge=None,
            estimate=mean(list(tokens[system, mode].values()), summary.seed),
            unparsed=0,
            absent=0,
            against="/".join(reference) if (system, mode) != reference else None,
            difference=paired(tokens[reference], tokens[system, mode], summary.seed)
            if (system, mode) != reference
            else None,
        )
        for system, mode in names
    ]


def _point(one: MetricScores, score: Estimate, seed: int) -> Point:
    return Point(
        task=one.task,
        metric=one.metric,
        system=one.system,
        mode=one.mode,
        tokens=mean([float(sum(row.tokens.values())) for row in one.rows], seed),
        score=score,
    )


def _settings(path: Path) -> dict[str, Any]:
    """The suite and the arguments of its tasks from `suite.json`; empty without that file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {"suite": content["suite"], "args": content["args"]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"report: {path} is damaged ({first_line(error)}); run `mote eval` again") from error


def _read(path: Path, kind: type[_Model]) -> _Model:
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f"report: {path} is damaged ({first_line(error)}); remove it and make it again") from error
