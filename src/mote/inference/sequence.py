"""A request in the running batch: its prompt, what of it is cached, the tokens generated so far, and the next one.

Each draw depends on its sequence alone, so a sequence gets the same tokens in any batch.
Shapes: B row, V vocabulary.
"""

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mote.core.generation import Sampling
from mote.inference.kv_slots import EMPTY, PrefillChunk, Prefix
from mote.inference.request import Request
from mote.tokens.routing import QUESTION

_TOP_K = 50  # the nucleus is sought among these; sorting a whole vocabulary costs more than a small model on a CPU


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


def draw(scores_B_V: Tensor, samplings: Sequence[Sampling], generated: Sequence[int]) -> Tensor:
    """The next token of each sequence (B).

    Args:
        scores_B_V: Logits.
        samplings: Of each sequence; temperature 0 takes the most likely token.
        generated: Tokens each sequence has generated so far: with its seed, all that its draw depends on.
    """
    if not any(sampling.temperature for sampling in samplings):
        return scores_B_V.argmax(-1)
    device = scores_B_V.device
    uniform = [
        random.Random(f"{sampling.seed}/{step}").random() for sampling, step in zip(samplings, generated, strict=True)
    ]
    u_B_1 = torch.tensor(uniform, device=device)[:, None]
    temperature_B_1 = torch.tensor([sampling.temperature for sampling in samplings], device=device)[:, None]
    top_p_B_1 = torch.tensor([sampling.top_p for sampling in samplings], device=device)[:, None]
    top, ids = scores_B_V.float().topk(min(_TOP_K, scores_B_V.shape[-1]), dim=-1)
    probability = (top / torch.where(temperature_B_1 > 0, temperature_B_1, 1)).softmax(-1)
    before = probability.cumsum(-1) - probability
    kept = torch.where(before < top_p_B_1, probability, 0)
    cumulative = kept.cumsum(-1) / kept.sum(-1, keepdim=True)
    index = (cumulative <= u_B_1).sum(-1, keepdim=True).clamp_max((kept > 0).sum(-1, keepdim=True) - 1)
    return ids.gather(1, torch.where(temperature_B_1 > 0, index, 0))[:, 0]


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
