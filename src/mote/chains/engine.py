"""What the chain loop knows of a model: it writes text for prompts, and it chooses between words."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from mote.core.errors import UserError
from mote.core.records import Finish, Message


@dataclass(frozen=True)
class Prompt:
    """One request.

    Attributes:
        messages: The dialogue to go on with.
        max_tokens: Tokens that may be written.
        temperature: 0 is greedy.
        top_p: Nucleus to sample from.
        seed: Seed of this request alone: the same text comes out whatever else is asked beside it, as far as the
            engine's arithmetic allows.
        frequency_penalty: Taken from a token's score for each time the text has it already, against loops.
        shared: How many leading messages other prompts begin with as well, so that an engine may read them once.
    """

    messages: tuple[Message, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    frequency_penalty: float = 0.0
    shared: int = 0


@dataclass(frozen=True)
class Completion:
    """What came back.

    Attributes:
        text: What was written.
        tokens: Tokens that were written.
        finish: Whether it ended by itself.
        read: Tokens of the prompt, those of a shared beginning too; None where a server does not say.
    """

    text: str
    tokens: int
    finish: Finish
    read: int | None = None


@dataclass(frozen=True)
class Preference:
    """Which of two words a model would write next.

    Attributes:
        score: The probability of the first against the second.
        tokens: Tokens that were written to know it.
        read: Tokens of the prompt; None where a server does not say.
    """

    score: float
    tokens: int = 0
    read: int | None = None


@dataclass(frozen=True)
class Likelihood:
    """How likely a text is.

    Attributes:
        mean: Log-probability of its tokens, in nats a token.
        read: Tokens of the prompt and of the text.
    """

    mean: float
    read: int


class Refused(UserError):
    """The engine will not work on this request, however often it is asked; others may pass."""


@runtime_checkable
class Scorer(Protocol):
    """An engine that also knows how likely a given text is."""

    async def score(self, prompt: Prompt, reply: str) -> Likelihood:
        """How likely a reply is."""


class Engine(Protocol):
    """A source of text; it bounds by itself how much it works on at once. Both questions may raise `Refused`."""

    name: str

    async def write(self, prompt: Prompt) -> Completion:
        """Go on with a dialogue."""

    async def choose(self, prompt: Prompt, choices: tuple[str, str]) -> Preference:
        """The probability of the first choice against the second as the next word."""

    async def close(self) -> None:
        """Let go of connections, threads and memory."""
