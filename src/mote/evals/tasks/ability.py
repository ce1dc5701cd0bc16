"""Ability: MMLU and GSM8K from local rows with `prompt`, `answer` and optionally `system`, scored by exact match."""

import hashlib
from itertools import islice

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import mean

from mote.core.errors import UserError
from mote.core.records import Message
from mote.evals.scorers import exact
from mote.evals.tasks.samples import chat, task_name
from mote.questions.files import raw_rows


@task(name=task_name("mmlu"))
def mmlu(file: str, limit: int | None = None) -> Task:
    """Accuracy on multiple-choice questions.

    Args:
        file: Rows with `prompt`, `answer` (a letter) and `system`.
        limit: Use the first N rows.
    """
    return Task(dataset=_samples(file, limit), scorer=exact("letter"), metrics=[mean()])


@task(name=task_name("gsm8k"))
def gsm8k(file: str, limit: int | None = None) -> Task:
    """Accuracy on word problems with a numeric answer.

    Args:
        file: Rows with `prompt`, `answer` (a number) and `system`.
        limit: Use the first N rows.
    """
    return Task(dataset=_samples(file, limit), scorer=exact("number"), metrics=[mean()])


def _samples(file: str, limit: int | None) -> list[Sample]:
    samples = []
    for place, row in islice(raw_rows(file), limit):
        if not row.get("prompt") or row.get("answer") in (None, ""):
            raise UserError(f"file: {place} lacks a prompt or an answer; the columns are system, prompt and answer")
        prompt = str(row["prompt"])
        system = str(row.get("system") or "")
        messages = [Message(role="system", content=system)] if system else []
        messages.append(Message(role="user", content=prompt))
        name = hashlib.sha256(f"{system}\n{prompt}".encode()).hexdigest()[:12]
        samples.append(
            Sample(
                id=name,
                input=chat(tuple(messages)),
                target=str(row["answer"]),
                metadata={"question_id": name, "kind": "benign", "type": ""},
            )
        )
    if not samples:
        raise UserError(f"file: {file} holds no rows; give one with at least one")
    return samples
