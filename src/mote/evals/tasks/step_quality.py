"""Quality of the reasoning steps, 1 to 10 (section 4.3, figure 5): the text of a step is judged, not the answer."""

from inspect_ai import Task, task
from inspect_ai.scorer import mean

from mote.evals.scorers import judged
from mote.evals.tasks.samples import sample_of, task_name
from mote.questions.load import load_questions


@task(name=task_name("analysis_quality"))
def analysis_quality(file: str, judge: str, limit: int | None = None) -> Task:
    """Quality of the question analysis; answers without one count as absent.

    Args:
        file: Questions.
        judge: Name of the judge.
        limit: Use the first N questions.
    """
    return _task(file, judge, "analysis", limit)


@task(name=task_name("guidance_quality"))
def guidance_quality(file: str, judge: str, limit: int | None = None) -> Task:
    """Quality of the answer guidance; answers without one count as absent.

    Args:
        file: Questions.
        judge: Name of the judge.
        limit: Use the first N questions.
    """
    return _task(file, judge, "guidance", limit)


def _task(file: str, judge: str, step: str, limit: int | None) -> Task:
    samples = [sample_of(question) for question in load_questions(file, limit)]
    return Task(dataset=samples, scorer=judged(judge, f"{step}-quality", step), metrics=[mean()])
