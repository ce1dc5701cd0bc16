"""The judge protocol: a question and an answer -> a verdict, with a card that goes with every reported number."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from mote.chains.engine import Completion, Preference, Prompt
from mote.core.records import Frozen, Message, Question

COMPLIANCE, PARTIAL_REFUSAL, FULL_REFUSAL = "full_compliance", "partial_refusal", "full_refusal"
SAFE, UNSAFE = "safe", "unsafe"
UNPARSED = "unparsed"


class Verdict(Frozen):
    """The verdict of a judge on one answer.

    Attributes:
        label: A class (`full_compliance`, `partial_refusal`, `full_refusal` of refusal; `safe`, `unsafe` of harm) or,
            for a numeric scale, the number; `unparsed` if the judge's text holds no verdict.
        score: The number on the judge's scale; None if it has none or the verdict is unparsed.
        raw: The judge's text or finding.
        parsed: Whether `raw` holds a verdict.
        tokens: Tokens generated for the verdict.
        prompt_tokens: Prompt tokens spent on it; None if unknown.
    """

    label: str
    score: float | None
    raw: str
    parsed: bool
    tokens: int = 0
    prompt_tokens: int | None = None


class JudgeCard(Frozen):
    """The judge, its prompt, and the meaning of its numbers.

    Attributes:
        name: The judge's name on the command line.
        revision: Revision of the model or the rule; empty if unknown.
        prompts: sha256 of the prompt, the format or the rule.
        measures: `refusal`, `harm`, `help`, ...; judges that measure different things never share a column.
        scale: Meaning of labels and scores.
    """

    name: str
    revision: str
    prompts: str
    measures: str
    scale: str


class Judge(Protocol):
    """A judge of one property; calls may run concurrently."""

    card: JudgeCard

    async def judge(self, question: Sequence[Message], answer: str) -> Verdict:
        """Judge the answer to a dialogue's last turn."""


@runtime_checkable
class QuestionJudge(Protocol):
    """A judge of chains that knows the question's label and the quality rule that the answer broke, if any."""

    card: JudgeCard

    async def judge_question(self, question: Question, answer: str, broken_rule: str | None) -> Verdict:
        """Judge the answer to a labelled question."""


class Writer(Protocol):
    """The part of an engine that an LLM judge needs."""

    name: str

    async def write(self, prompt: Prompt) -> Completion:
        """Continue a dialogue."""


class Chooser(Protocol):
    """The part of an engine that Safety Checking by next-word probability needs."""

    name: str

    async def choose(self, prompt: Prompt, choices: tuple[str, str]) -> Preference:
        """The probability of the first choice against the second as the next word."""


def unparsed(raw: str) -> Verdict:
    """The verdict for a text that holds none."""
    return Verdict(label=UNPARSED, score=None, raw=raw, parsed=False)
