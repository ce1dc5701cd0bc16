"""Reads a run folder and counts what `report.json` and `report.html` show.

Independent of how the files were made and how they are shown. A part whose files are missing is None or empty.
"""

import json
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mote.chains.stats import in_order, outcomes_by_depth
from mote.core.errors import UserError, first_line
from mote.core.files import sha256_of
from mote.core.recipe import Recipe
from mote.core.recipe_file import dump_recipe, load_recipe
from mote.core.records import Answer, ChainRow, Question, read_rows
from mote.report.contents import (
    AnsweredQuestion,
    ChainCounts,
    ChainShape,
    ModeAnswers,
    QuestionCounts,
    Report,
    StageRecord,
    TrainingSummary,
)
from mote.report.evaluation import Evaluation, mode_rank, read_evaluation

HASHED = ("questions.jsonl", "chains.jsonl", "adapter/adapter_model.safetensors", "evals/results.jsonl")

AnswersByMode = dict[tuple[str, str], dict[str, Answer]]  # (system, mode) -> question id -> answer


class _LoggedMetrics(BaseModel):
    """A line of `metrics.jsonl`: a training step, or a held-out evaluation with `eval_loss...` as extra fields."""

    model_config = ConfigDict(extra="allow")

    step: int
    epoch: float | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    peak_memory_mb: float | None = None


def summarise(folder: Path) -> Report:
    """Summarise a run folder.

    Raises:
        UserError: The folder holds no part of a run, or one of its files is damaged.
    """
    recipe = load_recipe(folder / "recipe.yaml") if (folder / "recipe.yaml").exists() else None
    environment = _read_object(folder / "environment.json")
    questions = read_rows(folder / "questions.jsonl", Question)
    chains = read_rows(folder / "chains.jsonl", ChainRow)
    metrics = read_rows(folder / "metrics.jsonl", _LoggedMetrics)
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
        answers=tuple(_mode_answers(system, mode, list(rows.values())) for (system, mode), rows in answers.items()),
        evaluation=evaluation,
        stages=stages,
        environment=environment,
        files={name: digest[:16] for name in HASHED if (digest := sha256_of(folder / name))},
        settings=recipe.model_dump(mode="json") if recipe else {},
        recipe=dump_recipe(recipe) if recipe else None,
        command=shlex.join(["mote", "run", f"{name}/recipe.yaml", "--out", f"{name}-again"]),
        answered=_side_by_side(answers),
        judged=judged,
    )


def _model(recipe: Recipe | None, chains: Sequence[ChainRow], evaluation: Evaluation | None) -> str | None:
    if recipe or chains:
        return recipe.model if recipe else chains[0].model
    return evaluation.systems[0].model.removeprefix("mote/") if evaluation else None


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object, non-finite numbers as None; empty if the file does not exist.

    Raises:
        UserError: The file is not a JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"report: {path} cannot be read ({error}); remove it and run again") from error
    if not isinstance(value, dict):
        raise UserError(f"report: {path} holds a {type(value).__name__}, not an object; remove it and run again")
    cleaned: dict[str, Any] = _without_non_finite(value)
    return cleaned


def _read_answers(folder: Path) -> AnswersByMode:
    answers: AnswersByMode = {}
    for path in sorted(folder.glob("*.jsonl")):
        for row in read_rows(path, Answer):
            answers.setdefault((row.system, row.mode), {})[row.id] = row
    return dict(sorted(answers.items(), key=lambda item: (item[0][0], mode_rank(item[0][1]))))


def _stages(rows: Any, path: Path) -> tuple[StageRecord, ...]:
    try:
        return tuple(StageRecord.model_validate(row) for row in rows)
    except (TypeError, ValidationError) as error:
        raise UserError(f"report: {path}: stages: {first_line(error)}; remove the file and run again") from error


def _questions(rows: Sequence[Question]) -> QuestionCounts:
    return QuestionCounts(
        total=len(rows),
        kinds=dict(sorted(Counter(row.kind for row in rows).items())),
        sources=dict(sorted(Counter(row.source for row in rows).items())),
    )


def _chains(rows: Sequence[ChainRow]) -> ChainCounts:
    accepted = [row for row in rows if row.accepted]
    depths = outcomes_by_depth(Counter((row.step_names, row.outcome) for row in rows))
    steps = in_order(depth.steps for depth in depths)
    return ChainCounts(
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


def _training(rows: Sequence[_LoggedMetrics], adapter: Mapping[str, Any]) -> TrainingSummary:
    train = {row.step: row for row in rows if "loss" in row.model_fields_set}  # a resumed run repeats steps
    curve = tuple((step, train[step].loss) for step in sorted(train))
    finite = tuple((step, loss) for step, loss in curve if loss is not None and math.isfinite(loss))
    held_out = _held_out(rows)
    speeds = _finite(row.tokens_per_second for row in rows)
    last = max(rows, key=lambda row: row.step)
    return TrainingSummary(
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


def _held_out(rows: Sequence[_LoggedMetrics]) -> dict[str, tuple[tuple[int, float], ...]]:
    """Name (`all` or a reasoning step) -> (training step, held-out loss)."""
    losses: dict[str, dict[int, float]] = {}
    for row in rows:
        for key, value in (row.model_extra or {}).items():
            if key.startswith("eval_loss") and isinstance(value, int | float) and math.isfinite(value):
                losses.setdefault(key.removeprefix("eval_loss").lstrip("_") or "all", {})[row.step] = float(value)
    return {name: tuple(sorted(points.items())) for name, points in losses.items()}


def _mode_answers(system: str, mode: str, rows: Sequence[Answer]) -> ModeAnswers:
    shapes = Counter(row.step_names for row in rows)
    steps_in_order = in_order([*shapes, *(tuple(row.tokens.steps) for row in rows)])
    return ModeAnswers(
        system=system,
        mode=mode,
        total=len(rows),
        tokens={step: sum(row.tokens.steps.get(step, 0) for row in rows) / len(rows) for step in steps_in_order},
        mean_tokens=sum(row.tokens.total for row in rows) / len(rows),
        mean_seconds=_mean(row.seconds for row in rows),
        stop=sum(row.finish == "stop" for row in rows),
        length=sum(row.finish == "length" for row in rows),
        shapes=tuple(
            ChainShape(steps=steps, count=shapes[steps]) for steps in sorted(shapes, key=lambda s: (len(s), s))
        ),
    )


def _side_by_side(answers: AnswersByMode) -> tuple[AnsweredQuestion, ...]:
    questions: dict[str, Question] = {}
    for rows in answers.values():
        for key, row in rows.items():
            questions.setdefault(key, row)
    return tuple(
        AnsweredQuestion(question=question, answers=tuple(rows.get(key) for rows in answers.values()))
        for key, question in questions.items()
    )


def _finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def _mean(values: Iterable[float | None]) -> float | None:
    finite = _finite(values)
    return sum(finite) / len(finite) if finite else None


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_non_finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
