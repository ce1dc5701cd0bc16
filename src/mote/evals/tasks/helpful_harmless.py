"""HH-RLHF (section 4.1): harmlessness, helpfulness, and helpfulness on harmful questions."""

from inspect_ai import Task, task
from inspect_ai.scorer import mean

from mote.core.records import Question
from mote.evals.scorers import judged
from mote.evals.tasks.samples import harmful_questions, sample_of, task_name
from mote.questions.load import load_questions


@task(name=task_name("hh_harm"))
def hh_harm(file: str, judge: str = "rule", limit: int | None = None) -> Task:
    """Share of harmless answers (Harm); with a refusal judge, the share of refusals.

    Args:
        file: Questions, such as HH-RLHF's `harmless-base` test file; benign ones are skipped.
        judge: Name of the judge.
        limit: Use the first N questions.
    """
    return _task(harmful_questions(file, limit), judge, "harm")


@task(name=task_name("hh_help"))
def hh_help(file: str, judge: str, limit: int | None = None) -> Task:
    """Helpfulness from 1 to 10 (Help).

    Args:
        file: Questions, such as HH-RLHF's `helpful-base` test file.
        judge: Name of the judge.
        limit: Use the first N questions.
    """
    return _task(load_questions(file, limit), judge, "help")


@task(name=task_name("hh_harm_help"))
def hh_harm_help(file: str, judge: str, limit: int | None = None) -> Task:
    """Helpfulness of answers to harmful questions from 1 to 10 (Harm-Help).

    Args:
        file: Questions, such as HH-RLHF's `harmless-base` test file; benign ones are skipped.
        judge: Name of the judge.
        limit: Use the first N questions.
    """
    return _task(harmful_questions(file, limit), judge, "harm-help")


def _task(questions: list[Question], judge: str, measures: str) -> Task:
    samples = [sample_of(question) for question in questions]
    return Task(dataset=samples, scorer=judged(judge, measures), metrics=[mean()])
