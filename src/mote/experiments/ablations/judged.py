"""Judged answers of a variant: tasks of the suite `paper`, by any judge, on upstream files or on `mote:test`."""

import re
from pathlib import Path

from mote.core.errors import UserError
from mote.core.recipe import Recipe
from mote.core.scheme import BASE
from mote.evals.results import Summary, System
from mote.evals.suite_config import Suite, load_suite, task_args
from mote.evals.systems import systems_of
from mote.experiments.ablations.ablation_recipe import Ablations, Variant

RULE = "rule"
OWN_QUESTIONS = "mote:test"
RATED = ("hh-help", "hh-harm-help", "analysis-quality", "guidance-quality")  # tasks that need a judge that rates
_RATERS = ("llm:", "inspect:")


def rates(judge: str) -> bool:
    """Whether a judge can give ratings: one that is asked in words."""
    return judge.startswith(_RATERS)


def suite_of(wanted: Ablations, recipe: Recipe, judge: str, data: Path | None) -> Suite:
    """The tasks of a comparison that the judge can judge, as a suite.

    Args:
        wanted: Names the tasks.
        recipe: Its `answer` says how many questions are asked, and how long answers may be.
        judge: Who judges.
        data: Folder of the upstream files; without it every task asks the package's own test questions.
    """
    shipped = load_suite("paper")
    tasks = [task for task in shipped.tasks if task.task in wanted.tasks and (task.task not in RATED or rates(judge))]
    if data is None:
        tasks = [task.model_copy(update={"file": OWN_QUESTIONS}) for task in tasks]
    answer = recipe.answer
    return Suite(
        name=wanted.name,
        tasks=tuple(tasks),
        k=shipped.k,
        max_step_tokens=answer.max_step_tokens,
        batch_size=answer.batch_size,
        temperature=answer.temperature,
    )


def check_tasks(wanted: Ablations, judge: str, data: Path | None) -> None:
    """Make sure that everything the tasks need is there, before hours are spent on training.

    Raises:
        UserError: It is not.
    """
    if not wanted.tasks:
        return
    try:
        import inspect_ai  # noqa: F401 (an extra)
    except ModuleNotFoundError as error:
        raise UserError("tasks: inspect-ai is not installed; install mote-align[eval]") from error
    if not set(wanted.tasks) - set(RATED) and not rates(judge):
        raise UserError(f"judge: '{judge}' can judge none of {list(wanted.tasks)}, which are ratings; give --judge "
                        "llm:MODEL or inspect:MODEL")  # fmt: skip
    suite = suite_of(wanted, wanted.recipe, judge, data)
    for task in suite.tasks:
        file = task_args(task, suite, judge, None, data)["file"]
        if data is not None and not Path(file).exists():
            raise UserError(f"data: {file} of the task {task.task} does not exist; docs/evaluation.md says what "
                            "--data holds, without --data the package's own questions are asked")  # fmt: skip


def evaluate(
    wanted: Ablations, variant: Variant, recipe: Recipe, folder: Path, judge: str, data: Path | None
) -> Summary:
    """Ask and judge a variant that is trained or needs no training; what is there is kept.

    Args:
        wanted: Names the tasks.
        variant: What answers.
        recipe: Its recipe.
        folder: Its run folder; the rule's verdicts go into it, those of another judge into a folder of its name in it.
        judge: Who judges.
        data: Folder of the upstream files.
    """
    from mote.evals.suite import SuiteRun

    own = folder if judge == RULE else folder / re.sub(r"[^\w.-]+", "-", judge)
    suite = suite_of(wanted, recipe, judge, data)
    if variant.kind == "prompted":
        systems = [_prompted(recipe)]
    else:
        systems = systems_of(recipe.model, [f"mote={folder / 'adapter'}"], [], recipe.answer.modes)
    run = SuiteRun(
        suite,
        systems,
        own,
        judge,
        limit=recipe.answer.limit,
        seed=recipe.seed,
        data=data,
        device=recipe.device,
        dtype=recipe.dtype,
    )
    return Summary.model_validate_json(run.run().read_text(encoding="utf-8"))


def _prompted(recipe: Recipe) -> System:
    return System(
        name=BASE,
        model=f"mote-prompting/{recipe.model}",
        adapter=None,
        modes=(BASE,),
        fingerprint=BASE,
        args={
            "scheme": recipe.scheme,
            "examples": recipe.chains.examples,
            "frequency_penalty": recipe.chains.frequency_penalty,
            "max_step_tokens": recipe.answer.max_step_tokens,
            "batch_size": recipe.answer.batch_size,
            "device": recipe.device,
            "dtype": recipe.dtype,
            "revision": recipe.revision,
        },
    )
