"""What the chain loop knows of a model: it writes text for prompts, and it chooses between words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mote.records import Finish, Message


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
    """

    messages: tuple[Message, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """What came back: the text, its number of tokens and whether it ended by itself."""

    text: str
    tokens: int
    finish: Finish


class Engine(Protocol):
    """A source of text."""

    name: str

    def write(self, prompts: Sequence[Prompt]) -> list[Completion]:
        """One completion for each prompt, in order."""

    def choose(self, prompts: Sequence[Prompt], choices: tuple[str, str]) -> list[float]:
        """For each prompt, the probability of the first choice against the second as the next word."""
