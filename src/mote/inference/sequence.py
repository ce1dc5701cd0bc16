"""A request in the running batch: its prompt, what of it is cached, and the tokens generated so far."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mote.inference.kv_slots import EMPTY, PrefillChunk, Prefix
from mote.inference.request import Request
from mote.tokens.routing import QUESTION


@dataclass(eq=False)
class RunningSequence:
    """A sequence whose prompt is prefilled and which then decodes.

    Attributes:
        request: What to generate.
        result: Future of its result.
        prompt: Tokens to prefill.
        prefix: Shared prefix that the prompt starts with.
        cached: Tokens in its slot.
        generated: Tokens generated so far.
        step: Step id of the last token.
        steps: Step id of each prompt token; empty without an adapter.
        score: Sum of the log-probabilities of the scored ids so far.
    """

    request: Request
    result: "Future[Any]"
    prompt: Sequence[int]
    prefix: Prefix = EMPTY
    cached: int = 0
    generated: list[int] = field(default_factory=list)
    step: int = QUESTION
    steps: list[int] = field(default_factory=list)
    score: float = 0.0

    @property
    def own(self) -> Sequence[int]:
        """The prompt after the prefix."""
        return self.prompt[self.prefix.length :]

    @property
    def length(self) -> int:
        """Tokens with keys and values, those of the prefix included."""
        return self.prefix.length + self.cached

    @property
    def capacity(self) -> int:
        """Tokens that its slot may have to hold."""
        return len(self.request.ids) - self.prefix.length + max(self.request.limit, 0) + self.request.extra

    def length_at(self, chunk: PrefillChunk) -> int:
        """Length of the text that the tokens of a chunk belong to: the whole prompt, or all up to a decoded token."""
        return max(len(self.prompt), chunk.prefix.length + chunk.end)

    def scored(self, chunk: PrefillChunk) -> Iterator[tuple[int, int]]:
        """Indices in the forward pass whose logits score an id, each with that id."""
        ids = self.request.ids
        shift = chunk.prefix.length + chunk.offset - chunk.start + 1  # from an index to where the next id is
        first = len(ids) - self.request.scored - shift
        last = len(ids) - shift
        for index in range(max(chunk.start, first), min(chunk.stop, last)):
            yield index, ids[index + shift]

    def masked(self, logits_V: Tensor) -> Tensor:
        """The logits of the next token, penalised, with what the grammar forbids at minus infinity."""
        penalty = self.request.frequency_penalty
        if penalty and self.generated:
            ids = torch.tensor(self.generated, device=logits_V.device)
            logits_V = logits_V.index_add(0, ids, logits_V.new_full((len(ids),), -penalty))
        return self.request.grammar.mask(logits_V, self.generated)


def by_prefix(sequences: list[RunningSequence], device: torch.device) -> list[tuple[Prefix, Tensor | slice]]:
    """The prefixes of sequences, each with the indices of its sequences."""
    members: dict[Prefix, list[int]] = {}
    for index, sequence in enumerate(sequences):
        members.setdefault(sequence.prefix, []).append(index)
    if len(members) == 1:
        return [(prefix, slice(None)) for prefix in members]
    return [(prefix, torch.tensor(indices, device=device)) for prefix, indices in members.items()]


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading tokens two texts share."""
    shorter = min(len(one), len(other))
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), shorter)
