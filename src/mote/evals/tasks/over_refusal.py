"""Over-refusal and refusal on safe and unsafe prompts, in three classes: XSTest, JailbreakBench, any questions."""

from itertools import chain, zip_longest
from pathlib import Path

from inspect_ai import Task, task
from inspect_ai.scorer import mean

from mote.chains.judge import COMPLIANCE, FULL_REFUSAL, PARTIAL_REFUSAL
from mote.core.errors import UserError
from mote.core.records import Question
from mote.evals.scorers import judged, share_of
from mote.evals.tasks.samples import sample_of, task_name
from mote.questions.files import raw_rows
from mote.questions.load import load_questions

_BEHAVIORS = ("harmful-behaviors.csv", "benign-behaviors.csv")  # JailbreakBench's files, upstream names


@task(name=task_name("xstest"))
def xstest(file: str, judge: str = "rule", limit: int | None = None) -> Task:
    """Compliance with safe prompts (not_overrefuse) and refusal of unsafe ones, in three classes.

    Args:
        file: XSTest's prompts, or any question file whose questions are `benign` or `harmful`.
        judge: Name of the judge; it must distinguish the three classes.
        limit: Use the first N prompts.

    Raises:
        UserError: The file does not say which prompts are safe.
    """
    return _task(load_questions(file, limit), _types(file, "prompt", "type"), judge, file, "XSTest's file")


@task(name=task_name("jailbreakbench"))
def jailbreakbench(file: str, judge: str = "rule", limit: int | None = None) -> Task:
    """Refusal of JailbreakBench's 100 harmful behaviours and compliance with its 100 benign ones, in three classes.

    Args:
        file: Folder with JailbreakBench's `harmful-behaviors.csv` and `benign-behaviors.csv`, or any question file
            whose questions are `benign` or `harmful`.
        judge: Name of the judge; it must distinguish the three classes.
        limit: Use the first N behaviours, of a folder harmful and benign ones in turn.

    Raises:
        UserError: One of the two files is missing, or a question file does not say which questions are benign.
    """
    folder = Path(file).expanduser()
    if not folder.is_dir():
        return _task(
            load_questions(file, limit), _types(file, "Goal", "Category"), judge, file, "JailbreakBench's folder"
        )
    files = [str(folder / name) for name in _BEHAVIORS]
    pairs = zip_longest(*(load_questions(path, None) for path in files))
    questions = [question for question in chain.from_iterable(pairs) if question is not None]
    types = {goal: category for path in files for goal, category in _types(path, "Goal", "Category").items()}
    return _task(questions[:limit], types, judge, file, "JailbreakBench's folder")


@task(name=task_name("over_refusal"))
def over_refusal(file: str, judge: str = "rule", limit: int | None = None) -> Task:
    """Compliance with the benign questions of any file and refusal of its harmful ones, in three classes.

    Args:
        file: Questions that are `benign` or `harmful`, such as `mote:test`.
        judge: Name of the judge; it must distinguish the three classes.
        limit: Use the first N questions.

    Raises:
        UserError: The file does not say which questions are benign.
    """
    return _task(load_questions(file, limit), {}, judge, file, "mote:test")


def _types(file: str, text: str, type_: str) -> dict[str, str]:
    """Prompt -> type, from the upstream columns; empty strings if the file does not have them."""
    return {str(row.get(text)).strip(): str(row.get(type_, "")) for _, row in raw_rows(file)}


def _task(questions: list[Question], types: dict[str, str], judge: str, file: str, upstream: str) -> Task:
    if all(question.kind == "unknown" for question in questions):
        raise UserError(f"file: {file} does not say which prompts are safe; give {upstream}, or questions with a kind")
    samples = [sample_of(question, types.get(question.text, "")) for question in questions]
    classes = [
        share_of(label, kind) for kind in ("benign", "harmful") for label in (COMPLIANCE, PARTIAL_REFUSAL, FULL_REFUSAL)
    ]
    return Task(dataset=samples, scorer=judged(judge, "refusal"), metrics=[mean(), *classes])
