"""The content of a report: the typed fields of `report.json`, and what only the page shows."""

from typing import Any

from pydantic import Field

from mote.chains.stats import Outcomes
from mote.core.records import Answer, Frozen, Question
from mote.core.scheme import Chain
from mote.evals.results import EvalRow
from mote.report.evaluation import Evaluation


class QuestionCounts(Frozen):
    """The questions of a run.

    Attributes:
        total: Number of questions.
        kinds: Kind -> number of questions.
        sources: Source -> number of questions.
    """

    total: int
    kinds: dict[str, int]
    sources: dict[str, int]


class ChainCounts(Frozen):
    """The chains of the run; each is accepted, rejected by a rule, or unsafe at every depth.

    Attributes:
        total: Number of chains.
        accepted: Safe, and no quality rule broken.
        unsafe: Judged unsafe at every depth, though no rule rejected them.
        rejected: Reason -> number of chains.
        depths: The same counts by the chains' steps.
        shares: Step -> fraction of the accepted chains that have it.
        mean_tokens_made: Mean generated tokens per chain.
        mean_tokens_kept: Mean tokens per chain that the chain kept.
        mean_tokens_read: Mean prompt tokens per chain, over the chains that recorded them.
        mean_seconds: Mean seconds per chain.
    """

    total: int
    accepted: int
    unsafe: int
    rejected: dict[str, int]
    depths: tuple[Outcomes, ...]
    shares: dict[str, float]
    mean_tokens_made: float | None
    mean_tokens_kept: float | None
    mean_tokens_read: float | None
    mean_seconds: float | None


class TrainingSummary(Frozen):
    """Losses, speed and memory of training.

    Attributes:
        steps: Optimizer updates.
        epochs: Epochs.
        loss_first: First logged training loss.
        loss_last: Last logged training loss.
        not_finite: Number of logged losses that are not finite.
        held_out: Last held-out losses: `all`, each step, and `markers`.
        tokens_per_second: Median over the logged lines.
        peak_memory_mb: Maximum over the logged lines.
        curve: Pairs of update and training loss.
        held_out_curve: Name -> pairs of update and held-out loss.
        adapter: `r`, `lora_alpha`, `mix` and `experts` of the adapter; empty without one.
    """

    steps: int
    epochs: float | None
    loss_first: float | None
    loss_last: float | None
    not_finite: int
    held_out: dict[str, float]
    tokens_per_second: float | None
    peak_memory_mb: float | None
    curve: tuple[tuple[int, float], ...]
    held_out_curve: dict[str, tuple[tuple[int, float], ...]]
    adapter: dict[str, Any]


class ChainShape(Frozen):
    """Answers with exactly these steps.

    Attributes:
        steps: Names of the steps.
        count: Number of answers.
    """

    steps: Chain
    count: int


class ModeAnswers(Frozen):
    """The answers of one system in one mode.

    Attributes:
        system: Name of the system.
        mode: Mode it answered in.
        total: Number of answers.
        tokens: Step -> mean tokens, over all answers (0 for an answer without the step).
        mean_tokens: Mean tokens per answer.
        mean_seconds: Mean seconds per answer.
        stop: Number of answers that ended by themselves.
        length: Number of answers cut off at the budget.
        shapes: Which steps the answers have.
    """

    system: str
    mode: str
    total: int
    tokens: dict[str, float]
    mean_tokens: float
    mean_seconds: float | None
    stop: int
    length: int
    shapes: tuple[ChainShape, ...]

    @property
    def tokens_of_no_step(self) -> float:
        """Mean tokens outside any step."""
        return max(0.0, round(self.mean_tokens - sum(self.tokens.values()), 6))


class StageRecord(Frozen):
    """One stage of the run.

    Attributes:
        stage: Name of the stage.
        seconds: Wall-clock time of its last execution.
        reused: Whether its result already existed.
        peak_memory_mb: Peak memory of the process at its end.
    """

    stage: str
    seconds: float | None = None
    reused: bool = False
    peak_memory_mb: float | None = None


class AnsweredQuestion(Frozen):
    """A question with its answers in the order of the modes, None for a mode that has not answered it."""

    question: Question
    answers: tuple[Answer | None, ...]


class Report(Frozen):
    """The content of a report; excluded fields are shown in the page but not written to `report.json`.

    Attributes:
        name: Name of the run.
        model: Base model.
        scheme: Scheme: steps and prompts.
        seed: Seed of the run.
        questions: The questions that chains were made for.
        chains: The chains; each is accepted, rejected or unsafe.
        training: How training went.
        answers: One object per system and mode.
        evaluation: Results of `mote eval`.
        stages: The stages, as in `environment.json`.
        environment: `versions` and `machine` of `environment.json`.
        files: File of the run -> prefix of its sha256.
        settings: Every setting of the recipe.
        recipe: The recipe as YAML.
        command: Command line that repeats the run.
        answered: Questions with the answers of all modes.
        judged: Result rows of the evaluation.
    """

    name: str
    model: str | None
    scheme: str | None
    seed: int | None
    questions: QuestionCounts | None
    chains: ChainCounts | None
    training: TrainingSummary | None
    answers: tuple[ModeAnswers, ...]
    evaluation: Evaluation | None
    stages: tuple[StageRecord, ...]
    environment: dict[str, Any]
    files: dict[str, str]
    settings: dict[str, Any]
    recipe: str | None = Field(None, exclude=True)
    command: str = Field("", exclude=True)
    answered: tuple[AnsweredQuestion, ...] = Field((), exclude=True)
    judged: tuple[EvalRow, ...] = Field((), exclude=True)
