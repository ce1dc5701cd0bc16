"""Constrained decoding: which tokens may come next, so that an answer is a chain of its mode, or plain text."""

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from mote.tokens.routing import Markers

MIN_STEP_TOKENS = 4  # minimum tokens of a step with its markers if the whole answer has a budget
_MINUS_INFINITY = float("-inf")


class ChainState(NamedTuple):
    """What the grammar needs to know of the ids so far.

    Attributes:
        chain: Indices of the steps opened so far.
        length: Tokens in the open step, -1 if no step is open.
        total: Tokens in all.
    """

    chain: tuple[int, ...]
    length: int
    total: int


START = ChainState(chain=(), length=-1, total=0)


def chains_within(chains: Sequence[tuple[int, ...]], max_tokens: int | None) -> tuple[tuple[int, ...], ...]:
    """The chains that can be finished within `max_tokens`; the shortest one if none can."""
    if max_tokens is None:
        return tuple(chains)
    fitting = tuple(chain for chain in chains if MIN_STEP_TOKENS * len(chain) <= max_tokens)
    return fitting or (min(chains, key=len),)


class ChainGrammar:
    """Constrains an answer to a chain of its mode.

    The first token is a start marker. Inside a step every token except special ones is allowed, and its own end marker.
    After an end marker comes the start marker of a step that continues an allowed chain, or the end of the turn. A step
    that has used its budget is closed. Half of the total budget is reserved for the response: once the reasoning has
    used the other half, it is closed and the response follows as soon as the mode allows it.

    Args:
        chains: The chains of the mode, as step indices; all end with the response. Those that cannot be finished within
            `max_tokens` are left out.
        markers: Marker ids of the steps.
        eos_id: End of the turn.
        max_step_tokens: Budget of a step.
        max_tokens: Budget of the whole answer, markers included; None for no such budget.
    """

    def __init__(
        self,
        chains: Sequence[tuple[int, ...]],
        markers: Markers,
        eos_id: int,
        max_step_tokens: int,
        max_tokens: int | None = None,
    ) -> None:
        self.chains = chains_within(chains, max_tokens)
        self.markers = markers
        self.eos_id = eos_id
        self.max_step_tokens = max_step_tokens
        self.max_tokens = max_tokens

    def advance(self, state: ChainState, ids: Iterable[int]) -> ChainState:
        """The state after these ids."""
        chain, length, total = state
        for id_ in ids:
            total += 1
            if id_ in self.markers.starts:
                chain = (*chain, self.markers.starts.index(id_))
                length = 0
            elif id_ in self.markers.ends:
                length = -1
            elif length >= 0:
                length += 1
        return ChainState(chain, length, total)

    def next_ids(self, state: ChainState) -> tuple[list[int], bool]:
        """(allowed special ids, forced): forced means ordinary tokens are masked out."""
        chain, length, total = state
        response = self.chains[0][-1]
        half_used = self.max_tokens is not None and total >= self.max_tokens // 2
        if length >= 0:
            full = length >= self.max_step_tokens
            if self.max_tokens is not None:
                full |= half_used if chain[-1] != response else total >= self.max_tokens - 1
            return ([self.markers.ends[chain[-1]]] if length or full else []), full
        following = {c[len(chain)] for c in self.chains if c[: len(chain)] == chain and len(c) > len(chain)}
        if half_used and response in following:
            following = {response}
        return ([self.markers.starts[step] for step in sorted(following)] or [self.eos_id]), True

    def allowed(self, ids: Sequence[int]) -> tuple[list[int], bool]:
        """`next_ids` after all ids of an answer."""
        return self.next_ids(self.advance(START, ids))

    def ended(self, generated: Sequence[int]) -> bool:
        """Whether the response, with which every chain ends, is closed."""
        return generated[-1] == self.markers.ends[self.chains[0][-1]]


class FreeText:
    """Any text up to the end of the turn.

    Args:
        stop_ids: Ids that end the turn.
        forbidden: Ids that must not be generated: with the adapter off, the markers, whose rows are untrained.
    """

    def __init__(self, stop_ids: Collection[int], forbidden: Sequence[int] = ()) -> None:
        self.stop_ids = frozenset(stop_ids)
        self.forbidden = torch.tensor(forbidden, dtype=torch.long)

    def mask(self, logits_V: Tensor, generated: Sequence[int]) -> Tensor:
        """The logits with the forbidden ids at minus infinity."""
        if not len(self.forbidden):
            return logits_V
        self.forbidden = self.forbidden.to(logits_V.device)  # copied there once, not for each token
        return logits_V.index_fill(0, self.forbidden, _MINUS_INFINITY)

    def ended(self, generated: Sequence[int]) -> bool:
        """Whether the turn has ended."""
        return generated[-1] in self.stop_ids


class StepGrammar(ChainGrammar):
    """`ChainGrammar` on logits.

    Args:
        chains: The chains of the mode, as step indices; all end with the response.
        markers: Marker ids of the steps.
        special_ids: Ids that no step may contain: the tokenizer's special tokens, and what ends a turn.
        eos_id: End of the turn.
        max_step_tokens: Budget of a step.
        max_tokens: Budget of the whole answer, markers included; None for no such budget.
    """

    def __init__(
        self,
        chains: Sequence[tuple[int, ...]],
        markers: Markers,
        special_ids: Collection[int],
        eos_id: int,
        max_step_tokens: int,
        max_tokens: int | None = None,
    ) -> None:
        super().__init__(chains, markers, eos_id, max_step_tokens, max_tokens)
        self.special_ids = torch.tensor(sorted({*special_ids, *markers.starts, *markers.ends, eos_id}))

    def mask(self, logits_V: Tensor, generated: Sequence[int]) -> Tensor:
        """The logits with every id that may not follow `generated` at minus infinity."""
        ids, forced = self.allowed(generated)
        if forced:
            masked = torch.full_like(logits_V, _MINUS_INFINITY)
        else:
            self.special_ids = self.special_ids.to(logits_V.device)  # copied there once, not for each token
            masked = logits_V.index_fill(0, self.special_ids, _MINUS_INFINITY)
        for id_ in ids:  # one to four; as a list they would be copied to a GPU, which waits
            masked[id_] = logits_V[id_]
        return masked


class OpenStep(StepGrammar):
    """A single step whose start marker ends the prompt."""

    @property
    def start(self) -> int:
        """Its start marker."""
        return self.markers.starts[self.chains[0][0]]

    @override
    def allowed(self, ids: Sequence[int]) -> tuple[list[int], bool]:
        return super().allowed([self.start, *ids])
