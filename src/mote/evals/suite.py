"""Runs a suite for several systems through Inspect: logs in OUT/evals/<system>/, rows and summary in OUT/evals/.

Each (system, mode, task) has a log of its own. The modes of a system run side by side on one loaded model, the base
model among those of the first adapter, and judging overlaps with generating. A run that was cut goes on where it was:
complete logs are kept, and of the others the samples that are there.
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

from mote.core.errors import MoteError, UserError, first_line
from mote.core.files import write_json
from mote.core.machine import environment
from mote.core.progress import Progress
from mote.core.scheme import BASE
from mote.evals import registry
from mote.evals.collect import collect
from mote.evals.prompting_provider import PromptingAPI
from mote.evals.provider import MoteAPI, mode_and_budget
from mote.evals.results import System
from mote.evals.suite_config import Suite, TaskSettings, task_args

_PROGRESS: list["_Count"] = []  # the run in progress, if any


class SuiteRun:
    """One run of a suite.

    Args:
        suite: The suite.
        systems: Who answers; each has a name of its own.
        out: Run folder.
        judge: Judge of the tasks that name none.
        limit: Questions of a task at most.
        seed: Seed of sampled answers and of resampling.
        data: Folder of the files that the suite names.
        device: Where models in this process run.
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
        self.suite, self.systems, self.out, self.limit, self.seed = suite, systems, out, limit, seed
        self.device, self.dtype = device, dtype
        self.folder = out / "evals"
        self.args = [task_args(task, suite, judge, limit, data) for task in suite.tasks]

    def run(self) -> Path:
        """Answer and judge everything that is not there yet; returns the path of `summary.json`.

        Raises:
            UserError: The folder holds another run, or a task or a judge cannot work.
            MoteError: A task failed; finished samples are kept.
        """
        with redirect_stdout(io.StringIO()), Progress("eval", "answers") as progress:  # Inspect greets on stdout
            planned = [(group, self._tasks(group)) for group in _groups(self.systems)]
            self._claim()  # behind what would show that a setting cannot work
            count = _Count(progress, sum(len(task.dataset) for _, tasks in planned for task in tasks))
            _PROGRESS.append(count)
            try:
                logs = [_named(group, log) for group, tasks in planned for log in self._logs(group, tasks, count)]
            finally:
                _PROGRESS.remove(count)
        command = shlex.join(["mote", *sys.argv[1:]])
        return collect(logs, self.suite, self.systems, self.folder, self.limit, self.seed, command, environment())

    def _logs(self, group: Sequence[System], tasks: list[Task], count: "_Count") -> list[EvalLog]:
        """All tasks of systems that share a model, in all their modes; the model is let go of afterwards."""
        try:
            done, logs = eval_set(
                tasks,
                log_dir=str(self.folder / group[-1].name),
                model=None,
                display="none",
                log_level="error",
                retry_attempts=1,
                retry_immediate=False,
                max_tasks=len(tasks),
                adaptive_connections=False,
                max_samples=4 * self.suite.batch_size,  # so that judging goes on beside what is being written
                fail_on_error=True,
                score_display=False,
                ctl_server=False,
                log_dir_allow_dirty=False,
                temperature=self.suite.temperature,
                seed=self.seed,
            )
        finally:
            for task in tasks:
                if task.model is not None and isinstance(task.model.api, MoteAPI | PromptingAPI):
                    task.model.api.close()
        if not done:
            raise MoteError(_failure(group, logs))
        count.reached(sum(len(task.dataset) for task in tasks))
        return logs

    def _tasks(self, group: Sequence[System]) -> list[Task]:
        """One Inspect task for each task and mode of systems that share a model, the modes of a task side by side."""
        models = {mode: self._model(group[-1], mode) for system in group for mode in system.modes}
        return [
            task_with(_inspect_task(task, args), model=model)
            for task, args in zip(self.suite.tasks, self.args, strict=True)
            for mode, model in models.items()
            if task.modes is None or {mode, mode_and_budget(mode)[0]} & {*task.modes}
        ]

    def _model(self, system: System, mode: str) -> Model:
        if not system.local:
            given: dict[str, Any] = {**system.args}
            return get_model(system.model, **given)
        args: dict[str, Any] = {"mode": mode} | ({"adapter": system.adapter} if system.adapter else {})
        return get_model(
            system.model,
            max_step_tokens=self.suite.max_step_tokens,
            batch_size=self.suite.batch_size,
            device=self.device,
            dtype=self.dtype,
            **args,
        )

    def _claim(self) -> None:
        """Make the folder this run's.

        Raises:
            UserError: It holds a run with other settings.
        """
        path = self.folder / "suite.json"
        wanted = {
            "suite": self.suite.model_dump(mode="json", exclude={"batch_size"}),
            "systems": [system.model_dump(mode="json") for system in self.systems],
            "args": self.args,
            "seed": self.seed,
        }
        if path.exists() and (there := json.loads(path.read_text(encoding="utf-8"))) != wanted:
            changed = [key for key in wanted if there.get(key) != wanted[key]]
            raise UserError(
                f"out: {self.folder} holds an evaluation with other settings (they differ in {', '.join(changed)}; an "
                "adapter that was trained again is another one); give another folder with --out, or remove that one"
            )
        write_json(path, wanted)


class _Count:
    """Samples that are done, for the progress of a run."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.done, self.base = progress, total, 0, 0
        self.often = max(1, total // 50)
        progress(0, total)

    def one(self) -> None:
        """One more sample of the system that is running."""
        self.done += 1
        if self.done % self.often == 0:
            self.progress(min(self.done, self.total), self.total)

    def reached(self, samples: int) -> None:
        """A system is through, with samples that were there before among its own."""
        self.base += samples
        self.done = self.base
        self.progress(self.done, self.total)


@hooks(name="mote_progress", description="Progress of `mote eval`.")
class _Shown(Hooks):
    """Counts the samples of a suite as Inspect finishes them."""

    def enabled(self) -> bool:
        return bool(_PROGRESS)

    async def on_sample_end(self, data: SampleEnd) -> None:
        """One sample is through."""
        _PROGRESS[-1].one()


def _inspect_task(task: TaskSettings, args: dict[str, Any]) -> Task:
    made: Task = getattr(registry, task.task.replace("-", "_"))(**args)
    return made


def _groups(systems: Sequence[System]) -> list[list[System]]:
    """Systems that one loaded model answers for: the base model goes with the first adapter, which is off for it."""
    groups = [[system] for system in systems]
    if len(groups) > 1 and systems[0].name == BASE and systems[1].adapter is not None:
        groups[:2] = [[systems[0], systems[1]]]
    return groups


def _named(group: Sequence[System], log: EvalLog) -> tuple[str, EvalLog]:
    """A log with the name of its system: only the base model answers in the mode `base` beside an adapter."""
    return (group[0] if mode_and_budget(_mode(log))[0] == BASE else group[-1]).name, log


def _mode(log: EvalLog) -> str:
    return str(log.eval.model_args.get("mode", BASE))


def _failure(group: Sequence[System], logs: Sequence[EvalLog]) -> str:
    failed = next(log for log in logs if log.status != "success")
    task = failed.eval.task.rpartition("/")[2].replace("_", "-")
    reason = first_line(Exception(failed.error.message)) if failed.error else f"its status is '{failed.status}'"
    return (
        f"eval: the task {task} of {_named(group, failed)[0]} in the mode {_mode(failed)} failed ({reason}); what is "
        f"finished is kept in {Path(failed.location).name}, mend it and run the same command again"
    )
