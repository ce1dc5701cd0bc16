"""What may be written next, on logits: the steps of a mode between their markers, or any text."""

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor

from mote.tokens.routing import Markers

LEAST = 4  # tokens of a step with its markers, where the budget in all is small


class Written(NamedTuple):
    """What the grammar needs to know of an answer's ids.

    Attributes:
        chain: Indices of the steps begun so far.
        length: Tokens in the open step, -1 while none is open.
        total: Tokens in all.
    """

    chain: tuple[int, ...]
    length: int
    total: int


NOTHING = Written(chain=(), length=-1, total=0)


def chains_within(chains: Sequence[tuple[int, ...]], max_tokens: int | None) -> tuple[tuple[int, ...], ...]:
    """The chains that can be finished within `max_tokens`; the shortest one if none can."""
    if max_tokens is None:
        return tuple(chains)
    fitting = tuple(chain for chain in chains if LEAST * len(chain) <= max_tokens)
    return fitting or (min(chains, key=len),)


class ChainGrammar:
    """Lets an answer be a chain of its mode.

    The first token is a start marker; inside a step every token but special ones and its own end marker is free; after
    an end marker comes the start of a step that some allowed chain goes on with, or the end. A step that has used its
    budget is closed. Half of the budget in all is the answer's: when the reasoning has used the other half, it is
    closed and the answer follows as soon as the mode allows.

    Args:
        chains: The chains of the mode, as indices of the steps; all end with the answer. Those that `max_tokens` leaves
            no room to finish are left out.
        markers: The steps' marker ids.
        eos_id: The end of the turn.
        max_step_tokens: Budget of a step.
        max_tokens: Budget in all, markers included; None for none.
    """

    def __init__(
        self,
        chains: Sequence[tuple[int, ...]],
        markers: Markers,
        eos_id: int,
        max_step_tokens: int,
        max_tokens: int | None = None,
    ) -> None:
        self.chains, self.markers, self.eos_id = chains_within(chains, max_tokens), markers, eos_id
        self.max_step_tokens, self.max_tokens = max_step_tokens, max_tokens

    def read(self, before: Written, ids: Iterable[int]) -> Written:
        """What is known of an answer once these ids came."""
        chain, length, total = before.chain, before.length, before.total
        for id_ in ids:
            total += 1
            if id_ in self.markers.starts:
                chain, length = (*chain, self.markers.starts.index(id_)), 0
            elif id_ in self.markers.ends:
                length = -1
            elif length >= 0:
                length += 1
        return Written(chain, length, total)

    def behind(self, written: Written) -> tuple[list[int], bool]:
        """Special tokens that may come next, and whether nothing else may."""
        chain, length = written.chain, written.length
        answer = self.chains[0][-1]
        over = self.max_tokens is not None and written.total >= self.max_tokens // 2
        if length >= 0:
            full = length >= self.max_step_tokens
            if self.max_tokens is not None:
                full |= over if chain[-1] != answer else written.total >= self.max_tokens - 1
            return ([self.markers.ends[chain[-1]]] if length or full else []), full
        following = {c[len(chain)] for c in self.chains if c[: len(chain)] == chain and len(c) > len(chain)}
        if over and answer in following:
            following = {answer}
        return ([self.markers.starts[step] for step in sorted(following)] or [self.eos_id]), True

    def allowed(self, ids: Sequence[int]) -> tuple[list[int], bool]:
        """`behind` all ids of an answer."""
        return self.behind(self.read(NOTHING, ids))

    def ended(self, written: Sequence[int]) -> bool:
        """Whether the answer has ended: its end marker is the last one of every chain."""
        return written[-1] == self.markers.ends[self.chains[0][-1]]


_NEVER = float("-inf")


class FreeText:
    """Any text up to the end of the turn.

    Args:
        eos_id: The end of the turn.
        forbidden: Tokens that must not come: with the adapter off, the untrained rows of the markers.
    """

    def __init__(self, eos_id: int, forbidden: Sequence[int] = ()) -> None:
        self.eos_id, self.forbidden = eos_id, torch.tensor(forbidden, dtype=torch.long)

    def mask(self, logits_V: Tensor, written: Sequence[int]) -> Tensor:
        """The logits with the forbidden tokens at minus infinity."""
        if not len(self.forbidden):
            return logits_V
        return logits_V.index_fill(0, self.forbidden.to(logits_V.device), _NEVER)

    def ended(self, written: Sequence[int]) -> bool:
        """Whether the turn has ended."""
        return written[-1] == self.eos_id


class StepGrammar(ChainGrammar, LogitsProcessor):
    """Lets a row write only chains of its mode, as `ChainGrammar` has it.

    Args:
        chains: The chains of the mode, as indices of the steps; all end with the answer.
        markers: The steps' marker ids.
        special_ids: Special tokens of the tokenizer, which no step may hold.
        eos_id: The end of the turn.
        prompt_length: Tokens of the padded prompt, where it is called as a logits processor.
        max_step_tokens: Budget of a step.
        max_tokens: Budget in all, markers included; None for none.
    """

    def __init__(
        self,
        chains: Sequence[tuple[int, ...]],
        markers: Markers,
        special_ids: Collection[int],
        eos_id: int,
        prompt_length: int,
        max_step_tokens: int,
        max_tokens: int | None = None,
    ) -> None:
        super().__init__(chains, markers, eos_id, max_step_tokens, max_tokens)
        self.prompt_length = prompt_length
        self.special_ids = torch.tensor(sorted({*special_ids, *markers.starts, *markers.ends, eos_id}))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) with what the grammar forbids at minus infinity: for transformers' `generate`."""
        written = input_ids[:, self.prompt_length :].tolist()
        return torch.stack([self.mask(row, ids) for row, ids in zip(scores, written, strict=True)])

    def mask(self, logits_V: Tensor, written: Sequence[int]) -> Tensor:
        """The logits with what the grammar forbids behind these ids at minus infinity."""
        ids, only = self.allowed(written)
        if only:
            masked = torch.full_like(logits_V, _NEVER)
        else:
            masked = logits_V.index_fill(0, self.special_ids.to(logits_V.device), _NEVER)
        masked[ids] = logits_V[ids]
        return masked


class OpenStep(StepGrammar):
    """One step, which the prompt has opened with its start marker."""

    @property
    def start(self) -> int:
        """The marker that the prompt ends with."""
        return self.markers.starts[self.chains[0][0]]

    def allowed(self, ids: Sequence[int]) -> tuple[list[int], bool]:
        """As for a whole chain, behind the start marker."""
        return super().allowed([self.start, *ids])
