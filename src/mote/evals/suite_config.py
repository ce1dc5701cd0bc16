"""What a suite is (a YAML file of tasks) and which systems it is run for; all is checked before a model is loaded."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from mote.core.errors import UserError, first_line
from mote.core.recipe import DEFAULT_MODES
from mote.core.records import Strict
from mote.core.scheme import BASE
from mote.evals.results import System

TaskName = Literal[
    "hh-harm",
    "hh-help",
    "hh-harm-help",
    "strongreject",
    "xstest",
    "analysis-quality",
    "guidance-quality",
    "mmlu",
    "gsm8k",
]
ABILITY: tuple[TaskName, ...] = ("mmlu", "gsm8k")  # tasks that nobody judges


class TaskSettings(Strict):
    """One task of a suite.

    Attributes:
        task: Its name.
        file: Questions: a path (a relative one is looked for in the data folder), `mote:test` or `hub:OWNER/NAME`.
        judge: Who judges; the suite's judge where none is given.
        limit: Questions at most.
        modes: Modes to run it in; all of the run's where none are given. A mode stands for all its budgets.
        args: Further arguments of the Inspect task, such as `techniques` or `cached`.
    """

    task: TaskName
    file: str
    judge: str | None = None
    limit: int | None = Field(None, ge=1)
    modes: tuple[str, ...] | None = None
    args: dict[str, str | int | float | bool] = Field({})


class Suite(Strict):
    """A suite of tasks, and how answers are generated for it.

    Attributes:
        name: Name in summaries.
        tasks: The tasks.
        k: Share of the techniques in goodness@k.
        max_step_tokens: Budget of one step.
        batch_size: Rows of a batch.
        temperature: 0 is greedy.
    """

    name: str
    tasks: tuple[TaskSettings, ...] = Field(min_length=1)
    k: float = Field(0.1, gt=0, le=1)
    max_step_tokens: int = Field(256, ge=1)
    batch_size: int = Field(16, ge=1)
    temperature: float = Field(0.0, ge=0)


def load_suite(name: str) -> Suite:
    """A suite of the package by its name, or any other from a YAML file.

    Raises:
        UserError: There is none, or it is not of this form.
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


def task_args(
    task: TaskSettings, suite: Suite, judge: str | None, limit: int | None, data: Path | None
) -> dict[str, Any]:
    """The arguments of the Inspect task.

    Args:
        task: The task.
        suite: Its suite.
        judge: Judge for tasks that name none.
        limit: Questions of a task at most; the task's own limit holds where it is lower.
        data: Folder in which relative files are looked for.

    Raises:
        UserError: The task needs a judge and has none, or there is no such judge.
    """
    args: dict[str, Any] = {key: _found(value, data) if key in _FILES else value for key, value in task.args.items()}
    args["file"] = _found(task.file, data)
    limits = [number for number in (task.limit, limit) if number is not None]
    args["limit"] = min(limits) if limits else None
    if task.task in ABILITY:
        return args
    its_judge = task.judge or judge
    if its_judge is None:
        raise UserError(f"judge: the task {task.task} of the suite '{suite.name}' needs one; give it with --judge")
    from mote.evals.task_judges import check_judge

    check_judge(its_judge)
    return args | {"judge": its_judge} | ({"k": suite.k} if task.task == "strongreject" else {})


def systems_of(
    model: str, adapters: Sequence[str], endpoints: Sequence[str], modes: Sequence[str] | None
) -> list[System]:
    """The systems of a run, the base model first.

    The base model is one system; it answers in the mode `base` where that is among the modes, or where there is no
    adapter. Each adapter answers in the other modes, and each endpoint once.

    Args:
        model: Base model of all adapters.
        adapters: `FOLDER` or `NAME=FOLDER`.
        endpoints: `NAME=MODEL`, Inspect's name of the model.
        modes: Modes, also with a budget of their own (`full@64`); all where none are given and there is an adapter.

    Raises:
        UserError: A name is taken twice, or there is no such adapter or mode.
    """
    from mote.evals.provider import check_system, fingerprint, mode_and_budget

    modes = modes or (DEFAULT_MODES if adapters else (BASE,))
    plain = tuple(mode for mode in modes if mode_and_budget(mode)[0] == BASE)
    own = tuple(mode for mode in modes if mode not in plain)
    if own and not adapters:
        check_system(None, own[0])
    systems = []
    if plain or not adapters:
        systems.append(System(name=BASE, model=f"mote/{model}", adapter=None, modes=plain or (BASE,), fingerprint=BASE))
    for given in adapters:
        name, _, folder = given.rpartition("=")
        for mode in own:
            check_system(folder, mode)
        system = System(
            name=name or "mote", model=f"mote/{model}", adapter=folder, modes=own, fingerprint=fingerprint(folder)
        )
        systems += [system] if own else []
    for given in endpoints:
        name, found, endpoint = given.partition("=")
        if not found or "/" not in endpoint:
            raise UserError(f"system: '{given}' is not NAME=MODEL; write for instance peer=openai-api/vllm/my-model")
        systems.append(System(name=name, model=endpoint, adapter=None, modes=(BASE,), fingerprint=endpoint))
    names = [system.name for system in systems]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"system: two systems are named '{twice}'; give each a name of its own, NAME=...")
    return systems


_FILES = ("attacks", "cached")


def _found(file: Any, data: Path | None) -> str:
    """A file's path, absolute so that a run can go on from any folder; names of sets stay as they are."""
    text = str(file)
    if text.startswith(("mote:", "hub:")):
        return text
    path = Path(text).expanduser()
    return str((data / path if data and not path.is_absolute() else path).absolute())
