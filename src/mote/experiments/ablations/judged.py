"""Judge a variant's answers with tasks of the suite `paper`, on upstream files or on `mote:test`."""

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
RATED = ("hh-help", "hh-harm-help", "analysis-quality", "guidance-quality")  # tasks whose judge gives ratings
_RATERS = ("llm:", "inspect:")


def rates(judge: str) -> bool:
    """Whether a judge can give ratings, as language models can."""
    return judge.startswith(_RATERS)


def suite_of(wanted: Ablations, recipe: Recipe, judge: str, data: Path | None) -> Suite:
    """The suite of those tasks that the judge can judge.

    Args:
        wanted: Names the tasks.
        recipe: Its `answer` limits the number of questions and the length of answers.
        judge: The judge.
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
    """Check before hours of training that everything the tasks need is available.

    Raises:
        UserError: Something is missing.
    """
    if not wanted.tasks:
        return
    try:
        import inspect_ai  # noqa: F401 (an extra)
    except ModuleNotFoundError as error:
        raise UserError("tasks: inspect-ai is not installed; install mote-align[eval]") from error
    if not set(wanted.tasks) - set(RATED) and not rates(judge):
        raise UserError(
            f"judge: '{judge}' can judge none of {list(wanted.tasks)}, which are ratings; give --judge llm:MODEL or "
            "inspect:MODEL"
        )
    suite = suite_of(wanted, wanted.recipe, judge, data)
    for task in suite.tasks:
        file = task_args(task, suite, judge, None, data)["file"]
        if data is not None and not Path(file).exists():
            raise UserError(
                f"data: {file} of the task {task.task} does not exist; docs/evaluation.md says what --data holds, "
                "without --data the package's own questions are asked"
            )


def evaluate(
    wanted: Ablations, variant: Variant, recipe: Recipe, folder: Path, judge: str, data: Path | None
) -> Summary:
    """Generate and judge a variant's answers; existing results are kept.

    Args:
        wanted: Names the tasks.
        variant: The variant, trained or prompted.
        recipe: Its recipe.
        folder: Its run folder; a judge other than the rule gets a subfolder.
        judge: The judge.
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
