"""Which marker may come next in an answer: whole chains of a mode, within their budgets.

A pure function of the ids written so far, without tensors, so that batches, beams, caches and other engines need
nothing more.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

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


class ChainGrammar:
    """Lets an answer be a chain of its mode.

    The first token is a start marker; inside a step every token but special ones and its own end marker is free; after
    an end marker comes the start of a step that some allowed chain goes on with, or the end. A step that has used its
    budget is closed. Half of the budget in all is the answer's: when the reasoning has used the other half, it is
    closed and the answer follows as soon as the mode allows.

    Args:
        chains: The chains of the mode, as indices of the steps; all end with the answer.
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
        self.chains, self.markers, self.eos_id = tuple(chains), markers, eos_id
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
