"""The stage `eval` of `mote run`: what the recipe asks to evaluate, checked before anything starts."""

from pathlib import Path

from mote.core.errors import UserError
from mote.core.recipe import Recipe
from mote.core.records import iter_rows
from mote.core.scheme import BASE
from mote.evals.suite_config import ABILITY, Suite, SuiteTask, load_suite, task_args


def suite_of_run(recipe: Recipe) -> Suite | None:
    """The suite that the recipe names, with all its files and judges checked; None if it asks for no evaluation.

    Raises:
        UserError: The suite, one of its files or a judge does not exist.
    """
    settings = recipe.eval
    if settings.suite is None:
        return None
    suite = load_suite(settings.suite)
    data = data_folder(recipe)
    for task in suite.tasks:
        for file in _files(task, data):
            if not file.exists():
                raise UserError(
                    f"recipe: eval.suite={settings.suite}: {file} of the task {task.task} does not exist; give the "
                    "folder that holds it with eval.data=FOLDER, or leave the evaluation out with eval=false"
                )
    for task in suite.tasks:
        if task.task not in ABILITY and (task.judge or settings.judge) is None:
            raise UserError(
                f"recipe: eval.judge=null: the task {task.task} of the suite '{suite.name}' needs a judge; name one, "
                "such as eval.judge=llm:MODEL"
            )
    if inspect_is_installed():
        for task in suite.tasks:
            task_args(task, suite, settings.judge, settings.limit, data)  # checks the judges' names
    return suite


def inspect_is_installed() -> bool:
    """Whether evaluations can run: Inspect comes with an extra."""
    try:
        import inspect_ai  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def data_folder(recipe: Recipe) -> Path | None:
    """The folder of the files that the suite names."""
    return Path(recipe.eval.data).expanduser() if recipe.eval.data else None


def evaluate(recipe: Recipe, suite: Suite, adapter: Path, folder: Path) -> int:
    """Evaluate an adapter and its base model in the recipe's modes -> `evals/` of the run folder.

    An interrupted evaluation resumes.

    Returns:
        The number of judged answers.
    """
    from mote.evals.results import EvalRow
    from mote.evals.suite import SuiteRun
    from mote.evals.systems import systems_of

    name = "mote" if recipe.answer.system == BASE else recipe.answer.system  # `base` is the base model's
    systems = systems_of(recipe.model, [f"{name}={adapter}"], [], recipe.answer.modes)
    args = {"revision": recipe.revision} if recipe.revision is not None else {}
    if recipe.answer_engine == "llamacpp":
        args["engine"] = recipe.answer_engine
    systems = [system.model_copy(update={"args": args}) for system in systems]
    run = SuiteRun(
        suite,
        systems,
        folder,
        recipe.eval.judge,
        limit=recipe.eval.limit,
        seed=recipe.seed,
        data=data_folder(recipe),
        device=recipe.device,
        dtype=recipe.dtype,
    )
    summary = run.run()
    return sum(1 for _ in iter_rows(summary.with_name("results.jsonl"), EvalRow))


def _files(task: SuiteTask, data: Path | None) -> list[Path]:
    names = [task.file, *(str(task.args[key]) for key in ("attacks", "cached") if key in task.args)]
    paths = [Path(name).expanduser() for name in names if not name.startswith(("mote:", "hub:"))]
    return [data / path if data and not path.is_absolute() else path for path in paths]
