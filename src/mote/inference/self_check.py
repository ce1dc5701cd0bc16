"""An answer that checks itself: attempt, check, and a deeper chain while the check says unsafe.

Attempts and checks are requests that follow each other in one place of the running batch, so that the question is
computed once. A check reads what it was trained on: the question and the answer, no other steps.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from mote.core.seeds import seed_of
from mote.inference.batching import Grammar, Request
from mote.inference.events import Checked, Item
from mote.tokens.routing import Markers


@dataclass(frozen=True)
class Verdicts:
    """How a verdict is read.

    Attributes:
        start: Start marker of the check.
        alike: Ids that both words begin with.
        ids: The first ids in which they differ.
        words: For an answer that passes, and for one that does not.
        threshold: Least probability of the first word at which an answer passes.
    """

    start: int
    alike: list[int]
    ids: tuple[int, int]
    words: tuple[str, str]
    threshold: float


class Begun:
    """A grammar behind ids that stand at the end of the prompt already."""

    def __init__(self, grammar: Grammar, ids: Sequence[int]) -> None:
        self._grammar, self._ids = grammar, list(ids)

    def mask(self, logits_V: Tensor, written: Sequence[int]) -> Tensor:
        """See `Grammar.mask`."""
        return self._grammar.mask(logits_V, [*self._ids, *written])

    def ended(self, written: Sequence[int]) -> bool:
        """See `Grammar.ended`."""
        return self._grammar.ended(written)


class SelfCheck:
    """The requests behind a first attempt; the row's result is the list of all `Item`s.

    Args:
        first: The first attempt; it gets its `follow`, and its `on_token` is told the verdicts too.
        chains: Mode -> its chain as indices of the steps, from the shortest to the deepest.
        grammar: Gives the grammar of one of these modes.
        markers: The steps' markers.
        verdicts: How a verdict is read.
    """

    def __init__(
        self,
        first: Request,
        chains: Mapping[str, tuple[int, ...]],
        grammar: Callable[[str], Grammar],
        markers: Markers,
        verdicts: Verdicts,
    ) -> None:
        self._first, self._chains, self._grammar = first, chains, grammar
        self._markers, self._verdicts = markers, verdicts
        self._items: list[Item] = []
        self._ids: list[int] = []  # of the chain that is tried
        first.follow, first.extra = self._attempted, 1 + len(verdicts.alike)  # a check's own tokens behind the answer

    def _attempted(self, written: list[int]) -> Request:
        """The check of a finished attempt."""
        self._items += written
        self._ids += written
        answer = self._ids[self._starts()[-1] :]
        ids = [*self._first.ids, *answer, self._verdicts.start, *self._verdicts.alike]
        return replace(self._first, ids=ids, limit=0, words=self._verdicts.ids, follow=self._judged)

    def _judged(self, score: float) -> Request | list[Item]:
        """The next deeper chain where the answer does not pass and there is one; else all that was written."""
        safe, modes = score >= self._verdicts.threshold, list(self._chains)
        starts = self._starts()
        tried = tuple(self._markers.starts.index(self._ids[at]) for at in starts)
        at = list(self._chains.values()).index(tried)
        checked = Checked(modes[at], safe, score, self._verdicts.words[0 if safe else 1])
        if safe or at + 1 == len(modes):
            self._add(checked)
            return self._items
        deeper = modes[at + 1]
        chain = self._chains[deeper]
        kept = next(i for i, (old, new) in enumerate(zip(tried, chain, strict=False)) if old != new)
        self._add(replace(checked, deeper=deeper, kept=kept))
        self._ids = [*self._ids[: starts[kept]], self._markers.starts[chain[kept]]]
        self._add(self._ids[-1])
        return replace(
            self._first,
            ids=[*self._first.ids, *self._ids],
            grammar=Begun(self._grammar(deeper), self._ids),
            limit=self._first.limit - len(self._ids),
            sampling=replace(self._first.sampling, seed=seed_of(self._first.sampling.seed, deeper)),
        )

    def _starts(self) -> list[int]:
        """Places of the start markers."""
        return [at for at, id_ in enumerate(self._ids) if id_ in self._markers.starts]

    def _add(self, item: Item) -> None:
        self._items.append(item)
        if self._first.on_token is not None:
            self._first.on_token(item)
