"""What the running batch generates: a prompt, the grammar of its continuation, and how to sample."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from mote.core.errors import UserError
from mote.core.generation import GREEDY, Sampling


class Grammar(Protocol):
    """Which tokens may come next."""

    def mask(self, logits_V: Tensor, generated: Sequence[int]) -> Tensor:
        """The logits with every token that may not follow these ids at minus infinity."""

    def ended(self, generated: Sequence[int]) -> bool:
        """Whether the text ends with the last of these ids."""


@dataclass(eq=False)
class Request:
    """A prompt to continue.

    Attributes:
        ids: Token ids of the prompt.
        grammar: Which tokens may be generated, and when the text ends.
        limit: Maximum number of generated tokens.
        shared: Number of leading tokens that other prompts share; their keys and values are computed and stored once.
        sampling: How to sample; the seed is this request's own.
        frequency_penalty: Subtracted from a token's logit for each time it was generated before.
        adapted: Whether the adapter is on, if there is one.
        words: Generate nothing; return the probability of the first of these token ids against the second.
        scored: Generate nothing; return the mean log-probability, in nats, of this many ids at the end of the prompt.
            They must start after the `shared` ones and one more.
        on_token: Called with each generated token, in the batcher's thread.
        follow: Called with the result, in the batcher's thread; must not raise. Returns the request that continues in
            the same slot, whose prompt starts with this one's, or the final result.
        extra: Tokens that such requests may hold beyond `limit`.

    Raises:
        UserError: The prompt has no tokens.
    """

    ids: Sequence[int]
    grammar: Grammar
    limit: int
    shared: int = 0
    sampling: Sampling = GREEDY
    frequency_penalty: float = 0.0
    adapted: bool = True
    words: tuple[int, int] | None = None
    scored: int = 0
    on_token: Callable[[Any], None] | None = None
    follow: "Callable[[Any], Request | Any] | None" = None
    extra: int = 0

    def __post_init__(self) -> None:
        if not len(self.ids):
            raise UserError("prompt: it has no tokens, so there is nothing to continue; give a text that is not empty")
