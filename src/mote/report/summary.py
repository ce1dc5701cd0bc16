"""What a run folder holds, counted: the one source of `report.json` and `report.html`.

Reads the files of a run and knows nothing of how they were made nor of how they are shown. A part whose files are
missing is None or empty.
"""

import json
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mote.chains.stats import Outcomes, in_order, outcomes_by_depth
from mote.core.errors import UserError, first_line
from mote.core.files import sha256_of
from mote.core.recipe import Recipe
from mote.core.recipe_file import dump_recipe, load_recipe
from mote.core.records import Answer, ChainRow, Frozen, Question, read_rows
from mote.core.scheme import Chain
from mote.evals.results import EvalRow
from mote.report.evaluation import Evaluation, mode_rank, read_evaluation

HASHED = ("questions.jsonl", "chains.jsonl", "adapter/adapter_model.safetensors", "evals/results.jsonl")

Answers = dict[tuple[str, str], dict[str, Answer]]  # (system, mode) -> question id -> answer


class Questions(Frozen):
    """The questions of a run.

    Attributes:
        total: Number of questions.
        kinds: Kind -> number of questions.
        sources: Source -> number of questions.
    """

    total: int
    kinds: dict[str, int]
    sources: dict[str, int]


class Chains(Frozen):
    """The chains of the run; each is accepted, rejected by a rule, or unsafe at every depth.

    Attributes:
        total: Number of chains.
        accepted: Safe, and no quality rule broken.
        unsafe: Judged unsafe at every depth, though no rule rejected them.
        rejected: Reason -> number of chains.
        depths: The same counts by the chains' steps.
        shares: Step -> fraction of the accepted chains that have it.
        mean_tokens_made: Mean generated tokens per chain.
        mean_tokens_kept: Mean tokens per chain that the chain kept.
        mean_tokens_read: Mean prompt tokens per chain, over the chains that recorded them.
        mean_seconds: Mean seconds per chain.
    """

    total: int
    accepted: int
    unsafe: int
    rejected: dict[str, int]
    depths: tuple[Outcomes, ...]
    shares: dict[str, float]
    mean_tokens_made: float | None
    mean_tokens_kept: float | None
    mean_tokens_read: float | None
    mean_seconds: float | None


class Training(Frozen):
    """How training went.

    Attributes:
        steps: Optimizer updates.
        epochs: Epochs.
        loss_first: First logged training loss.
        loss_last: Last logged training loss.
        not_finite: Number of logged losses that are not finite.
        held_out: Last held-out losses: `all`, each step, and `markers`.
        tokens_per_second: Median over the logged lines.
        peak_memory_mb: Maximum over the logged lines.
        curve: Pairs of update and training loss.
        held_out_curve: Name -> pairs of update and held-out loss.
        adapter: `r`, `lora_alpha`, `mix` and `experts` of the adapter; empty without one.
    """

    steps: int
    epochs: float | None
    loss_first: float | None
    loss_last: float | None
    not_finite: int
    held_out: dict[str, float]
    tokens_per_second: float | None
    peak_memory_mb: float | None
    curve: tuple[tuple[int, float], ...]
    held_out_curve: dict[str, tuple[tuple[int, float], ...]]
    adapter: dict[str, Any]


class Shape(Frozen):
    """How many answers have exactly these steps.

    Attributes:
        steps: Names of the steps.
        count: Number of answers.
    """

    steps: Chain
    count: int


class ModeAnswers(Frozen):
    """The answers of one system in one mode.

    Attributes:
        system: Name of the system.
        mode: Mode it answered in.
        total: Number of answers.
        tokens: Step -> mean tokens, over all answers (0 for an answer without the step).
        mean_tokens: Mean tokens per answer.
        mean_seconds: Mean seconds per answer.
        stop: Number of answers that ended by themselves.
        length: Number of answers cut off at the budget.
        shapes: Which steps the answers have.
    """

    system: str
    mode: str
    total: int
    tokens: dict[str, float]
    mean_tokens: float
    mean_seconds: float | None
    stop: int
    length: int
    shapes: tuple[Shape, ...]

    @property
    def tokens_of_no_step(self) -> float:
        """Mean tokens that belong to no step."""
        return max(0.0, round(self.mean_tokens - sum(self.tokens.values()), 6))


class Stage(Frozen):
    """One stage of the run.

    Attributes:
        stage: Name of the stage.
        seconds: Wall-clock time of its last execution.
        reused: Whether its result already existed.
        peak_memory_mb: Peak memory of the process at its end.
    """

    stage: str
    seconds: float | None = None
    reused: bool = False
    peak_memory_mb: float | None = None


class Asked(Frozen):
    """One question with its answers, in the order of the modes; None where a mode has not answered it."""

    question: Question
    answers: tuple[Answer | None, ...]


class Report(Frozen):
    """All that a report says; what is not in `report.json` is marked so.

    Attributes:
        name: Name of the run.
        model: Base model.
        scheme: Scheme: steps and prompts.
        seed: Seed of the run.
        questions: The questions that chains were made for.
        chains: The chains; each is accepted, rejected or unsafe.
        training: How training went.
        answers: One object per system and mode.
        evaluation: What `mote eval` measured.
        stages: The stages, as in `environment.json`.
        environment: `versions` and `machine` of `environment.json`.
        files: File of the run -> start of its sha256.
        settings: Every setting of the recipe.
    """

    name: str
    model: str | None
    scheme: str | None
    seed: int | None
    questions: Questions | None
    chains: Chains | None
    training: Training | None
    answers: tuple[ModeAnswers, ...]
    evaluation: Evaluation | None
    stages: tuple[Stage, ...]
    environment: dict[str, Any]
    files: dict[str, str]
    settings: dict[str, Any]
    recipe: str | None = Field(None, exclude=True)
    command: str = Field("", exclude=True)
    asked: tuple[Asked, ...] = Field((), exclude=True)
    judged: tuple[EvalRow, ...] = Field((), exclude=True)


class _Metric(BaseModel):
    """A line of `metrics.jsonl`: of a training step, or, with `eval_loss...` among the extras, of a held-out pass."""

    model_config = ConfigDict(extra="allow")

    step: int
    epoch: float | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    peak_memory_mb: float | None = None


def summarise(folder: Path) -> Report:
    """Read a run folder and count what a report needs.

    Raises:
        UserError: The folder holds no part of a run, or one of its files is damaged.
    """
    recipe = load_recipe(folder / "recipe.yaml") if (folder / "recipe.yaml").exists() else None
    environment = _read_object(folder / "environment.json")
    questions = read_rows(folder / "questions.jsonl", Question)
    chains = read_rows(folder / "chains.jsonl", ChainRow)
    metrics = read_rows(folder / "metrics.jsonl", _Metric)
    answers = _read_answers(folder / "answers")
    evaluation, judged = read_evaluation(folder) or (None, ())
    if not (recipe or environment or questions or chains or metrics or answers or evaluation):
        raise UserError(f"report: {folder} holds no part of a run; make one with `mote run RECIPE --out {folder}`")
    stages = _stages(environment.pop("stages", []), folder / "environment.json")
    name = folder.resolve().name
    return Report(
        name=recipe.name if recipe else name,
        model=_model(recipe, chains, evaluation),
        scheme=recipe.scheme if recipe else None,
        seed=recipe.seed if recipe else chains[0].seed if chains else evaluation.seed if evaluation else None,
        questions=_questions(questions) if questions else None,
        chains=_chains(chains) if chains else None,
        training=_training(metrics, _read_object(folder / "adapter" / "adapter_config.json")) if metrics else None,
        answers=tuple(_mode(system, mode, list(rows.values())) for (system, mode), rows in answers.items()),
        evaluation=evaluation,
        stages=stages,
        environment=environment,
        files={name: digest[:16] for name in HASHED if (digest := sha256_of(folder / name))},
        settings=recipe.model_dump(mode="json") if recipe else {},
        recipe=dump_recipe(recipe) if recipe else None,
        command=shlex.join(["mote", "run", f"{name}/recipe.yaml", "--out", f"{name}-again"]),
        asked=_side_by_side(answers),
        judged=judged,
    )


def _model(recipe: Recipe | None, chains: Sequence[ChainRow], evaluation: Evaluation | None) -> str | None:
    if recipe or chains:
        return recipe.model if recipe else chains[0].model
    return evaluation.systems[0].model.removeprefix("mote/") if evaluation else None


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object with every number that is not finite as None; empty where there is no such file.

    Raises:
        UserError: The file is no JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"report: {path} cannot be read ({error}); remove it and run again") from error
    if not isinstance(value, dict):
        raise UserError(f"report: {path} holds a {type(value).__name__}, not an object; remove it and run again")
    cleaned: dict[str, Any] = _finite_only(value)
    return cleaned


def _read_answers(folder: Path) -> Answers:
    found: Answers = {}
    for path in sorted(folder.glob("*.jsonl")):
        for row in read_rows(path, Answer):
            found.setdefault((row.system, row.mode), {})[row.id] = row
    return dict(sorted(found.items(), key=lambda item: (item[0][0], mode_rank(item[0][1]))))


def _stages(rows: Any, path: Path) -> tuple[Stage, ...]:
    try:
        return tuple(Stage.model_validate(row) for row in rows)
    except (TypeError, ValidationError) as error:
        raise UserError(f"report: {path}: stages: {first_line(error)}; remove the file and run again") from error


def _questions(rows: Sequence[Question]) -> Questions:
    return Questions(
        total=len(rows),
        kinds=dict(sorted(Counter(row.kind for row in rows).items())),
        sources=dict(sorted(Counter(row.source for row in rows).items())),
    )


def _chains(rows: Sequence[ChainRow]) -> Chains:
    accepted = [row for row in rows if row.accepted]
    depths = outcomes_by_depth(Counter((row.step_names, row.outcome) for row in rows))
    steps = in_order(depth.steps for depth in depths)
    return Chains(
        total=len(rows),
        accepted=len(accepted),
        unsafe=sum(depth.unsafe for depth in depths),
        rejected=dict(sorted(Counter(row.rejected for row in rows if row.rejected is not None).items())),
        depths=depths,
        shares={step: sum(step in row.step_names for row in accepted) / len(accepted) for step in steps}
        if accepted
        else {},
        mean_tokens_made=_mean(row.tokens.made for row in rows),
        mean_tokens_kept=_mean(row.tokens.kept for row in rows),
        mean_tokens_read=_mean(row.tokens.read for row in rows if row.tokens.read is not None),
        mean_seconds=_mean(row.seconds for row in rows),
    )


def _training(rows: Sequence[_Metric], adapter: Mapping[str, Any]) -> Training:
    train = {row.step: row for row in rows if "loss" in row.model_fields_set}  # a resumed run logs some steps again
    curve = tuple((step, train[step].loss) for step in sorted(train))
    finite = tuple((step, loss) for step, loss in curve if loss is not None and math.isfinite(loss))
    held_out = _held_out(rows)
    speeds = _finite(row.tokens_per_second for row in rows)
    last = max(rows, key=lambda row: row.step)
    return Training(
        steps=last.step,
        epochs=max((row.epoch for row in rows if row.epoch is not None and math.isfinite(row.epoch)), default=None),
        loss_first=finite[0][1] if finite else None,
        loss_last=finite[-1][1] if finite else None,
        not_finite=len(curve) - len(finite),
        held_out={name: points[-1][1] for name, points in held_out.items()},
        tokens_per_second=median(speeds) if speeds else None,
        peak_memory_mb=max(_finite(row.peak_memory_mb for row in rows), default=None),
        curve=finite,
        held_out_curve=held_out,
        adapter={key: adapter[key] for key in ("r", "lora_alpha", "mix", "experts") if key in adapter},
    )


def _held_out(rows: Sequence[_Metric]) -> dict[str, tuple[tuple[int, float], ...]]:
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        for key, value in (row.model_extra or {}).items():
            if key.startswith("eval_loss") and isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(key.removeprefix("eval_loss").lstrip("_") or "all", {})[row.step] = float(value)
    return {name: tuple(sorted(points.items())) for name, points in found.items()}


def _mode(system: str, mode: str, rows: Sequence[Answer]) -> ModeAnswers:
    shapes = Counter(row.step_names for row in rows)
    written = in_order([*shapes, *(tuple(row.tokens.steps) for row in rows)])
    return ModeAnswers(
        system=system,
        mode=mode,
        total=len(rows),
        tokens={step: sum(row.tokens.steps.get(step, 0) for row in rows) / len(rows) for step in written},
        mean_tokens=sum(row.tokens.total for row in rows) / len(rows),
        mean_seconds=_mean(row.seconds for row in rows),
        stop=sum(row.finish == "stop" for row in rows),
        length=sum(row.finish == "length" for row in rows),
        shapes=tuple(Shape(steps=steps, count=shapes[steps]) for steps in sorted(shapes, key=lambda s: (len(s), s))),
    )


def _side_by_side(answers: Answers) -> tuple[Asked, ...]:
    questions: dict[str, Question] = {}
    for rows in answers.values():
        for key, row in rows.items():
            questions.setdefault(key, row)
    return tuple(
        Asked(question=question, answers=tuple(rows.get(key) for rows in answers.values()))
        for key, question in questions.items()
    )


def _finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def _mean(values: Iterable[float | None]) -> float | None:
    finite = _finite(values)
    return sum(finite) / len(finite) if finite else None


def _finite_only(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite_only(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite_only(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
