"""Runs a suite for several systems through Inspect: logs in OUT/evals/<system>/, rows and summary in OUT/evals/.

There is one log per (system, mode, task). The modes of a system run concurrently on one loaded model, the base model
together with the first adapter, and judging overlaps with generation. An interrupted run resumes: complete logs are
kept, and so are the finished samples of the others.
"""

import io
import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from inspect_ai import Task, eval_set, task_with
from inspect_ai.hooks import Hooks, SampleEnd, hooks
from inspect_ai.log import EvalLog
from inspect_ai.model import Model, get_model
from typing_extensions import override

from mote.core.errors import MoteError, UserError, first_line
from mote.core.files import write_json
from mote.core.machine import environment
from mote.core.progress import Progress
from mote.core.scheme import BASE
from mote.evals import registry
from mote.evals.collect import collect
from mote.evals.provider import InProcessAPI
from mote.evals.results import System
from mote.evals.suite_config import Suite, SuiteTask, task_args
from mote.evals.systems import mode_and_budget

_PROGRESS: list["_SampleCounter"] = []  # of the run in progress, if any


class SuiteRun:
    """One run of a suite.

    Args:
        suite: The suite.
        systems: The systems to evaluate; their names are unique.
        out: Run folder.
        judge: Judge of tasks that do not name one.
        limit: Maximum number of questions per task.
        seed: Seed of sampling and of resampling.
        data: Folder in which the suite's relative paths are resolved.
        device: Device of models in this process.
        dtype: Their dtype.
    """

    def __init__(
        self,
        suite: Suite,
        systems: Sequence[System],
        out: Path,
        judge: str | None = None,
        limit: int | None = None,
        seed: int = 0,
        data: Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
    ) -> None:
        self.suite = suite
        self.systems = systems
        self.limit = limit
        self.seed = seed
        self.device = device
        self.dtype = dtype
        self.folder = out / "evals"
        self.args = [task_args(task, suite, judge, limit, data) for task in suite.tasks]

    def run(self) -> Path:
        """Generate and judge all answers that are not finished yet.

        Returns:
            Path of `summary.json`.

        Raises:
            UserError: The folder holds a different run, or the settings of a task or judge are invalid.
            MoteError: A task failed; finished samples are kept.
        """
        with redirect_stdout(io.StringIO()), Progress("eval", "answers") as progress:  # Inspect prints a banner
            planned = [(group, self._tasks(group)) for group in _groups(self.systems)]
            self._claim_folder()  # only after the tasks have shown that all settings are valid
            counter = _SampleCounter(progress, sum(len(task.dataset) for _, tasks in planned for task in tasks))
            _PROGRESS.append(counter)
            try:
                logs = [
                    (_system_of(group, log), log)
                    for group, tasks in planned
                    for log in self._run_tasks(group, tasks, counter)
                ]
            finally:
                _PROGRESS.remove(counter)
        command = shlex.join(["mote", *sys.argv[1:]])
        return collect(logs, self.suite, self.systems, self.folder, self.limit, self.seed, command, environment())

    def _run_tasks(self, group: Sequence[System], tasks: list[Task], counter: "_SampleCounter") -> list[EvalLog]:
        """Run all tasks of systems that share a model, in all their modes; the model is unloaded afterwards."""
        try:
            succeeded, logs = eval_set(
                tasks,
                log_dir=str(self.folder / group[-1].name),
                model=None,
                display="none",
                log_level="error",
                retry_attempts=1,
                retry_immediate=False,
                max_tasks=len(tasks),
                adaptive_connections=False,
                max_samples=4 * self.suite.batch_size,  # more than are generating, so that judging overlaps
                fail_on_error=True,
                score_display=False,
                ctl_server=False,
                log_dir_allow_dirty=False,
                temperature=self.suite.temperature,
                seed=self.seed,
            )
        finally:
            for task in tasks:
                if task.model is not None and isinstance(task.model.api, InProcessAPI):
                    task.model.api.close()
        if not succeeded:
            raise MoteError(_failure(group, logs))
        counter.finish_group(sum(len(task.dataset) for task in tasks))
        return logs

    def _tasks(self, group: Sequence[System]) -> list[Task]:
        """One Inspect task per task and mode of systems that share a model; the modes of a task are adjacent."""
        models = {mode: self._model(group[-1], mode) for system in group for mode in system.modes}
        return [
            task_with(_inspect_task(task, args), model=model)
            for task, args in zip(self.suite.tasks, self.args, strict=True)
            for mode, model in models.items()
            if task.modes is None or {mode, mode_and_budget(mode)[0]} & {*task.modes}
        ]

    def _model(self, system: System, mode: str) -> Model:
        if not system.local:
            endpoint_args: dict[str, Any] = {**system.args}
            return get_model(system.model, **endpoint_args)
        args: dict[str, Any] = {**system.args, "mode": mode}
        if system.adapter:
            args["adapter"] = system.adapter
        return get_model(
            system.model,
            max_step_tokens=self.suite.max_step_tokens,
            batch_size=self.suite.batch_size,
            device=self.device,
            dtype=self.dtype,
            **args,
        )

    def _claim_folder(self) -> None:
        """Record the settings of this run in its folder.

        Raises:
            UserError: The folder holds a run with other settings.
        """
        path = self.folder / "suite.json"
        wanted = {
            "suite": self.suite.model_dump(mode="json", exclude={"batch_size"}),
            "systems": [system.model_dump(mode="json") for system in self.systems],
            "args": self.args,
            "seed": self.seed,
        }
        if path.exists() and (existing := json.loads(path.read_text(encoding="utf-8"))) != wanted:
            changed = [key for key in wanted if existing.get(key) != wanted[key]]
            raise UserError(
                f"out: {self.folder} holds an evaluation with other settings (they differ in {', '.join(changed)}; an "
                "adapter that was trained again counts as another); give another folder with --out, or remove that one"
            )
        write_json(path, wanted)


class _SampleCounter:
    """Counts finished samples for the progress bar."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress = progress
        self.total = total
        self.done = 0
        self.finished_groups = 0  # samples of the groups that are complete
        self.every = max(1, total // 50)
        progress(0, total)

    def add_sample(self) -> None:
        """Count one sample of the running group."""
        self.done += 1
        if self.done % self.every == 0:
            self.progress(min(self.done, self.total), self.total)

    def finish_group(self, samples: int) -> None:
        """Count a whole group; samples kept from an interrupted run were not counted one by one."""
        self.finished_groups += samples
        self.done = self.finished_groups
        self.progress(self.done, self.total)


@hooks(name="mote_progress", description="Progress of `mote eval`.")
class _CountSamples(Hooks):
    """Counts samples as Inspect finishes them."""

    @override
    def enabled(self) -> bool:
        return bool(_PROGRESS)

    @override
    async def on_sample_end(self, data: SampleEnd) -> None:
        _PROGRESS[-1].add_sample()


def _inspect_task(task: SuiteTask, args: dict[str, Any]) -> Task:
    inspect_task: Task = getattr(registry, task.task.replace("-", "_"))(**args)
    return inspect_task


def _groups(systems: Sequence[System]) -> list[list[System]]:
    """Systems that share a loaded model: the base model and the first adapter, which is disabled for it."""
    groups = [[system] for system in systems]
    if len(groups) > 1 and systems[0].name == BASE and systems[1].adapter is not None:
        groups[:2] = [[systems[0], systems[1]]]
    return groups


def _system_of(group: Sequence[System], log: EvalLog) -> str:
    """Name of the system of a log: in a group with an adapter only the base model answers in the mode `base`."""
    return (group[0] if mode_and_budget(_mode(log))[0] == BASE else group[-1]).name


def _mode(log: EvalLog) -> str:
    return str(log.eval.model_args.get("mode", BASE))


def _failure(group: Sequence[System], logs: Sequence[EvalLog]) -> str:
    failed = next(log for log in logs if log.status != "success")
    task = failed.eval.task.rpartition("/")[2].replace("_", "-")
    reason = first_line(Exception(failed.error.message)) if failed.error else f"its status is '{failed.status}'"
    return (
        f"eval: the task {task} of {_system_of(group, failed)} in the mode {_mode(failed)} failed ({reason}); finished "
        f"samples are kept in {Path(failed.location).name}, fix the cause and run the same command again"
    )
