"""The files of `mote eval`, as a report shows them: the headline table, its curves, and agreement with people.

Reads `evals/` of a run folder and knows nothing of pages.
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

TOKENS = "tokens"  # the metric of what an answer costs, over all tasks
_Model = TypeVar("_Model", bound=BaseModel)


class Headline(Frozen):
    """One number of the headline table, with who judged and how far it is from the base model's.

    Attributes:
        task: Task; empty for `tokens`, which is over all of them.
        metric: Name of the metric.
        system: Name of the system.
        mode: Mode it answered in.
        judge: Card of the judge; none for `tokens`.
        estimate: The number.
        unparsed: Verdicts that could not be read.
        absent: Answers without the step that was to be judged.
        against: System and mode it is compared with, none for that one itself.
        difference: The difference to that one on the same prompts.
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
    """A point of a curve: what a headline metric costs (figure 6).

    Attributes:
        task: Task.
        metric: Headline metric.
        system: Name of the system.
        mode: Mode, with its budget where it has one of its own (`full@64`).
        tokens: Tokens of the answers that the metric is taken over.
        score: The metric.
    """

    task: str
    metric: str
    system: str
    mode: str
    tokens: Estimate
    score: Estimate


class Evaluation(Frozen):
    """What `mote eval` measured; see `Summary` for the fields of the same name.

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
        """Every system with each of its modes that answered, systems in their order and modes in the usual one."""
        return tuple((cost.system, cost.mode) for cost in self.costs)

    @property
    def harm_judged(self) -> bool:
        """Whether a judge of harm has judged: else no number may speak of it."""
        return any(card.measures in ("harm", "strongreject") for card in self.judges)


def read_evaluation(folder: Path) -> tuple[Evaluation, tuple[EvalRow, ...]] | None:
    """The evaluation in a run folder with its rows, None where there is none.

    Raises:
        UserError: One of its files is damaged.
    """
    evals = folder / "evals"
    if not (evals / "summary.json").exists():
        return None
    summary = _read(evals / "summary.json", Summary)
    rows = tuple(read_rows(evals / "results.jsonl", EvalRow))
    agreements = [_read(path, AgreementReport) for path in sorted(evals.glob("agreement-*.json"))]
    return evaluated(summary, rows, agreements, _settings(evals / "suite.json")), rows


def evaluated(
    summary: Summary, rows: Sequence[EvalRow], agreements: Sequence[AgreementReport], settings: dict[str, Any]
) -> Evaluation:
    """What a report shows of a summary and its rows."""
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
        agreement=tuple(found for found in agreements if found.judge in summary.judges),
        headline=(*_judged(summary, numbers, scored), *_costs(summary, rows, order)),
        groups=tuple(number for number in summary.numbers if number.group),
        curve=tuple(_point(one, numbers[one[:4]].estimate, summary.seed) for one in scored),
        costs=tuple(sorted(summary.costs, key=lambda cost: order(cost.system, cost.mode))),
        environment=summary.environment,
    )


def token_scores(rows: Sequence[EvalRow]) -> dict[tuple[str, str], dict[str, float]]:
    """(system, mode) -> prompt -> tokens of its answer."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        key = f"{row.task}/{row.technique}/{row.id}"
        found.setdefault((row.system, row.mode), {})[key] = float(sum(row.tokens.values()))
    return found


def mode_rank(mode: str) -> tuple[int, str, int]:
    """Modes in their usual order, those of other schemes before the adaptive one, budgets of their own behind."""
    name, _, budget = mode.partition("@")
    last = len(DEFAULT_MODES) - 1
    rank = DEFAULT_MODES.index(name) if name in DEFAULT_MODES[:-1] else last + (name == DEFAULT_MODES[-1])
    return rank, name, -int(budget) if budget.isdigit() else -(2**31)


def _order(systems: Sequence[System]) -> Callable[[str, str], tuple[int, tuple[int, str, int]]]:
    place = {system.name: number for number, system in enumerate(systems)}
    return lambda system, mode: (place.get(system, len(place)), mode_rank(mode))


def _judged(
    summary: Summary, numbers: Mapping[tuple[str, str, str, str], Number], scored: Sequence[MetricScores]
) -> list[Headline]:
    """The numbers over whole tasks, in the order of `scored`."""
    against = {(c.task, c.metric, c.second): c for c in summary.comparisons}
    cards = {(card.name, card.measures): card for card in summary.judges}
    found = []
    for one in scored:
        number = numbers[one[:4]]
        compared: Comparison | None = against.get((one.task, one.metric, one.name))
        found.append(
            Headline(
                task=one.task,
                metric=one.metric,
                system=one.system,
                mode=one.mode,
                judge=cards[one.rows[0].judge, one.rows[0].measures],
                estimate=number.estimate,
                unparsed=number.unparsed,
                absent=number.absent,
                against=compared.first if compared else None,
                difference=compared.result if compared else None,
            )
        )
    return found


def _costs(summary: Summary, rows: Sequence[EvalRow], order: Callable[[str, str], Any]) -> list[Headline]:
    """Tokens of an answer, over the answers of all tasks."""
    spent = token_scores(rows)
    names = sorted(spent, key=lambda name: order(*name))
    return [
        Headline(
            task="",
            metric=TOKENS,
            system=system,
            mode=mode,
            judge=None,
            estimate=mean(list(spent[system, mode].values()), summary.seed),
            unparsed=0,
            absent=0,
            against="/".join(names[0]) if (system, mode) != names[0] else None,
            difference=paired(spent[names[0]], spent[system, mode], summary.seed)
            if (system, mode) != names[0]
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
    """Suite and arguments of the tasks, as `suite.json` has them."""
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        return {"suite": there["suite"], "args": there["args"]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"report: {path} is damaged ({first_line(error)}); run `mote eval` again") from error


def _read(path: Path, kind: type[_Model]) -> _Model:
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f"report: {path} is damaged ({first_line(error)}); remove it and make it again") from error
