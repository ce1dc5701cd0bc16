"""Evaluation suites: YAML files of tasks, validated before a model is loaded."""

from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from mote.core.errors import UserError, first_line
from mote.core.records import Strict

TaskName = Literal[
    "hh-harm",
    "hh-help",
    "hh-harm-help",
    "strongreject",
    "adversarial-benign",
    "xstest",
    "jailbreakbench",
    "over-refusal",
    "analysis-quality",
    "guidance-quality",
    "mmlu",
    "gsm8k",
]
ABILITY: tuple[TaskName, ...] = ("mmlu", "gsm8k")  # tasks scored without a judge
_FILE_ARGS = ("attacks", "cached")  # task arguments that are file paths


class SuiteTask(Strict):
    """One task of a suite.

    Attributes:
        task: Name of the task.
        file: Questions: a path (a relative one is resolved in the data folder), `mote:test` or `hub:OWNER/NAME`.
        judge: Judge of this task; None for the suite's judge.
        limit: Maximum number of questions.
        modes: Modes to run the task in, each with all its budgets; None for all modes of the run.
        args: Further arguments of the Inspect task, such as `techniques` or `cached`.
    """

    task: TaskName
    file: str
    judge: str | None = None
    limit: int | None = Field(None, ge=1)
    modes: tuple[str, ...] | None = None
    args: dict[str, str | int | float | bool] = Field({})


class Suite(Strict):
    """A suite of tasks with its generation settings.

    Attributes:
        name: Name in summaries.
        tasks: The tasks.
        k: Share of the techniques in goodness@k.
        max_step_tokens: Token budget per step.
        batch_size: Maximum number of sequences in a batch.
        temperature: 0 is greedy.
    """

    name: str
    tasks: tuple[SuiteTask, ...] = Field(min_length=1)
    k: float = Field(0.1, gt=0, le=1)
    max_step_tokens: int = Field(256, ge=1)
    batch_size: int = Field(16, ge=1)
    temperature: float = Field(0.0, ge=0)

    @field_validator("tasks")
    @classmethod
    def _check_tasks_differ(cls, tasks: tuple[SuiteTask, ...]) -> tuple[SuiteTask, ...]:
        names = [task.task for task in tasks]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(
                f"the task {twice} appears twice, but results are identified by task; keep one, or make a second suite"
            )
        return tasks


def load_suite(name: str) -> Suite:
    """Load a suite of the package by name, or any other from a YAML file.

    Raises:
        UserError: The suite does not exist or is malformed.
    """
    shipped = resources.files("mote.evals") / "suites"
    path = Path(name) if name.endswith((".yaml", ".yml")) else None
    try:
        text = (path or shipped / f"{name}.yaml").read_text(encoding="utf-8")
        return Suite.model_validate(yaml.safe_load(text))
    except (OSError, UnicodeDecodeError) as error:
        known = sorted(entry.name.removesuffix(".yaml") for entry in shipped.iterdir())
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"suite: '{name}' cannot be read ({reason}); use one of {known} or a .yaml file") from error
    except (yaml.YAMLError, ValidationError) as error:
        raise UserError(f"suite: '{name}' is not a valid suite: {first_line(error)}") from error


def task_args(task: SuiteTask, suite: Suite, judge: str | None, limit: int | None, data: Path | None) -> dict[str, Any]:
    """The arguments of the Inspect task.

    Args:
        task: The task.
        suite: Its suite.
        judge: Judge of tasks that do not name one.
        limit: Maximum number of questions; the task's own limit applies if it is lower.
        data: Folder in which relative paths are resolved.

    Raises:
        UserError: The task needs a judge and has none, or the judge does not exist.
    """
    args: dict[str, Any] = {
        key: _resolve(value, data) if key in _FILE_ARGS else value for key, value in task.args.items()
    }
    args["file"] = _resolve(task.file, data)
    limits = [number for number in (task.limit, limit) if number is not None]
    args["limit"] = min(limits) if limits else None
    if task.task in ABILITY:
        return args
    its_judge = task.judge or judge
    if its_judge is None:
        raise UserError(f"judge: the task {task.task} of the suite '{suite.name}' needs one; give it with --judge")
    from mote.evals.task_judges import check_judge  # imports Inspect

    check_judge(its_judge)
    return args | {"judge": its_judge} | ({"k": suite.k} if task.task == "strongreject" else {})


def _resolve(file: Any, data: Path | None) -> str:
    """An absolute path, so that a run can be resumed from any folder; names of question sets are kept."""
    text = str(file)
    if text.startswith(("mote:", "hub:")):
        return text
    path = Path(text).expanduser()
    return str((data / path if data and not path.is_absolute() else path).absolute())
