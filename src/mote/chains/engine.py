"""The engine protocol of the chain loop: a model that generates text and scores the next word."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from mote.core.errors import UserError
from mote.core.records import Finish, Message


@dataclass(frozen=True)
class Prompt:
    """One request.

    Attributes:
        messages: The dialogue to continue.
        max_tokens: Budget of generated tokens.
        temperature: 0 is greedy.
        top_p: Nucleus sampling threshold.
        seed: Seed of this request alone: the completion does not depend on concurrent requests, as far as the engine's
            arithmetic allows.
        frequency_penalty: Subtracted from a token's logit for each earlier occurrence in the completion, against loops.
        shared: Number of leading messages that other prompts share, so that an engine can prefill them once.
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
    """The reply to a request.

    Attributes:
        text: Generated text.
        tokens: Generated tokens.
        finish: `stop`, or `length` if the budget was used up.
        prompt_tokens: Tokens of the prompt, the shared prefix included; None if a server does not report them.
    """

    text: str
    tokens: int
    finish: Finish
    prompt_tokens: int | None = None


@dataclass(frozen=True)
class Preference:
    """The next-word probability of one word against another.

    Attributes:
        score: p(first) / (p(first) + p(second)); None if the reply begins with neither word, as when a model reasons
            before it answers.
        tokens: Generated tokens.
        prompt_tokens: Tokens of the prompt; None if a server does not report them.
    """

    score: float | None
    tokens: int = 0
    prompt_tokens: int | None = None


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of a text.

    Attributes:
        mean: Mean log-probability of its tokens, in nats per token.
        prompt_tokens: Tokens of the prompt and of the text.
    """

    mean: float
    prompt_tokens: int


class Refused(UserError):
    """The engine rejects this request and would reject a retry; other requests may pass."""


@runtime_checkable
class Scorer(Protocol):
    """An engine that can also score a given text."""

    async def score(self, prompt: Prompt, reply: str) -> Likelihood:
        """The likelihood of `reply` as the continuation of the prompt."""


class Engine(Protocol):
    """A model; it limits its own concurrency. `write` and `choose` may raise `Refused`."""

    name: str

    async def write(self, prompt: Prompt) -> Completion:
        """Continue a dialogue."""

    async def choose(self, prompt: Prompt, choices: tuple[str, str]) -> Preference:
        """The probability of the first choice against the second as the next word."""

    async def close(self) -> None:
        """Release connections, threads and memory."""
