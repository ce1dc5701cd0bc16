"""XSTest: safe prompts that sound unsafe and unsafe contrast prompts, judged in three refusal classes."""

from inspect_ai import Task, task
from inspect_ai.scorer import mean

from mote.chains.judge import COMPLIANCE, FULL_REFUSAL, PARTIAL_REFUSAL
from mote.core.errors import UserError
from mote.evals.scorers import judged, share_of
from mote.evals.tasks.samples import sample_of, task_name
from mote.questions.files import raw_rows
from mote.questions.load import load_questions


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
    questions = load_questions(file, limit)
    if all(question.kind == "unknown" for question in questions):
        raise UserError(
            f"file: {file} does not say which prompts are safe; give XSTest's file, or questions with a kind"
        )
    types = {str(row.get("prompt")).strip(): str(row.get("type", "")) for _, row in raw_rows(file)}
    samples = [sample_of(question, types.get(question.text, "")) for question in questions]
    classes = [
        share_of(label, kind) for kind in ("benign", "harmful") for label in (COMPLIANCE, PARTIAL_REFUSAL, FULL_REFUSAL)
    ]
    return Task(dataset=samples, scorer=judged(judge, "refusal"), metrics=[mean(), *classes])
