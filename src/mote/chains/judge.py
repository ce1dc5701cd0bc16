"""What a judge is: it reads a question and an answer and gives a verdict; its card stands beside every number."""

from collections.abc import Sequence
from typing import Protocol

from mote.chains.engine import Completion, Preference, Prompt
from mote.core.records import Frozen, Message

COMPLIANCE, PARTIAL_REFUSAL, FULL_REFUSAL = "full_compliance", "partial_refusal", "full_refusal"
SAFE, UNSAFE = "safe", "unsafe"
UNPARSED = "unparsed"


class Verdict(Frozen):
    """What a judge says of one answer.

    Attributes:
        label: A class (`full_compliance`, `partial_refusal`, `full_refusal` of refusal; `safe`, `unsafe` of harm) or,
            on a scale, the number; `unparsed` where the judge's text holds no verdict.
        score: The number on the judge's scale, None where there is none; unparsed verdicts never have one.
        raw: What the judge wrote or found.
        parsed: Whether `raw` holds a verdict.
        written: Tokens that a model wrote for it.
        read: Tokens of the prompts that a model read for it; None where nobody counted.
    """

    label: str
    score: float | None
    raw: str
    parsed: bool
    written: int = 0
    read: int | None = None


class JudgeCard(Frozen):
    """Who judged, with what, and what the numbers mean.

    Attributes:
        name: As it is chosen on the command line.
        revision: Of the model or the rule; empty where it cannot be known.
        prompts: sha256 of the prompt, the format or the rule.
        measures: `refusal`, `harm`, `help`, ...; two judges that measure different things are never one column.
        scale: What labels and scores mean.
    """

    name: str
    revision: str
    prompts: str
    measures: str
    scale: str


class Judge(Protocol):
    """One judge of one thing; many calls may be under way at once."""

    card: JudgeCard

    async def judge(self, question: Sequence[Message], answer: str) -> Verdict:
        """Judge the answer to a dialogue's last turn."""


class Writer(Protocol):
    """What an LLM judge needs of a model: every engine has it, and others can be wrapped in it."""

    name: str

    async def write(self, prompt: Prompt) -> Completion:
        """One completion."""


class Chooser(Protocol):
    """What Safety Checking by the next word needs of a model; every engine has it."""

    name: str

    async def choose(self, prompt: Prompt, choices: tuple[str, str]) -> Preference:
        """The probability of the first choice against the second as the next word."""


def unparsed(raw: str) -> Verdict:
    """The verdict of a text that holds none."""
    return Verdict(label=UNPARSED, score=None, raw=raw, parsed=False)
