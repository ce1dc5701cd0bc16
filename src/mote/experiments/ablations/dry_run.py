"""The plan of ablations, printed before anything starts: `mote ablations RECIPE --dry-run`."""

from pathlib import Path

from mote.experiments.ablations.ablation_recipe import Ablations
from mote.experiments.ablations.judged import check_tasks, suite_of
from mote.experiments.plan import plan


def table(wanted: Ablations, judge: str, data: Path | None) -> str:
    """The variants with their trained parameters and time, and the judged tasks, as text.

    Raises:
        UserError: A setting cannot work.
    """
    check_tasks(wanted, judge, data)
    shared = plan(wanted.recipe)
    chains = next(stage for stage in shared.stages if stage.name == "chains")
    lines = [
        f"plan of '{wanted.name}' (times are rough estimates for this machine)",
        f"model    {wanted.recipe.model}: {shared.parameters:,} parameters in {shared.dtype}",
        f"chains   {chains.what}: {_hours(chains.seconds)}",
        "",
        f"{'variant':<34}{'kind':<10}{'method':<16}{'seeds':>6}{'trained':>14}{'training':>12}",
    ]
    for variant in wanted.variants:
        recipes = [recipe for other, recipe in wanted.runs() if other == variant]
        row = f"{variant.name:<34}{variant.kind:<10}"
        if variant.kind == "trained":
            own = plan(recipes[0], shared.machine)
            training = next(stage.seconds for stage in own.stages if stage.name == "train") or 0.0
            row += f"{variant.method:<16}{len(recipes):>6}{own.trainable:>14,}{_hours(training * len(recipes)):>12}"
        lines.append(row.rstrip())
    lines.append("")
    if wanted.tasks:
        lines += _judged(wanted, judge, data)
    lines += [f"note     {note}" for note in shared.notes]
    return "\n".join(lines)


def _judged(wanted: Ablations, judge: str, data: Path | None) -> list[str]:
    """The judged tasks, and those that the judge cannot judge."""
    tasks = suite_of(wanted, wanted.recipe, judge, data).tasks
    most = "all" if wanted.recipe.answer.limit is None else f"at most {wanted.recipe.answer.limit}"
    modes = ", ".join(wanted.recipe.answer.modes)
    lines = [
        f"judged   {task.task} by {task.judge or judge}: {most} questions of {task.file} in each of {modes}"
        for task in tasks
    ]
    left = [task for task in wanted.tasks if task not in {task.task for task in tasks}]
    if left:
        lines.append(f"left out {', '.join(left)}: ratings, which '{judge}' cannot give; give --judge llm:MODEL")
    return lines


def _hours(seconds: float | None) -> str:
    if seconds is None:
        return "not known"
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"
