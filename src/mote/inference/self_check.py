"""An answer that checks itself: attempt, check, and a deeper chain while the check says unsafe.

Attempts and checks are consecutive requests in one slot of the running batch, so the question is prefilled once. A
check sees what it was trained on: the question and the response, no other steps.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from typing_extensions import override

from mote.core.generation import seed_of
from mote.inference.events import Token, Verdict
from mote.inference.request import Grammar, Request
from mote.tokens.routing import Markers


@dataclass(frozen=True)
class CheckWords:
    """How a verdict is read from the logits.

    Attributes:
        start: Start marker of the check.
        common: Ids that both words start with.
        ids: The first ids in which they differ.
        words: For a response that passes, and for one that does not.
        threshold: Least probability of the first word with which a response passes.
    """

    start: int
    common: list[int]
    ids: tuple[int, int]
    words: tuple[str, str]
    threshold: float


class PrefixedGrammar(Grammar):
    """A grammar after ids that the prompt already ends with."""

    def __init__(self, grammar: Grammar, ids: Sequence[int]) -> None:
        self._grammar = grammar
        self._ids = list(ids)

    @override
    def mask(self, logits_V: Tensor, generated: Sequence[int]) -> Tensor:
        return self._grammar.mask(logits_V, [*self._ids, *generated])

    @override
    def ended(self, generated: Sequence[int]) -> bool:
        return self._grammar.ended(generated)


class SelfCheck:
    """The requests that follow a first attempt; the result is the list of all tokens and verdicts.

    Args:
        first: The first attempt; its `follow` is set, and its `on_token` receives the verdicts too.
        chains: Mode -> its chain as step indices, from the shortest to the deepest.
        grammar: Returns the grammar of one of these modes.
        markers: Markers of the steps.
        words: How a verdict is read.
    """

    def __init__(
        self,
        first: Request,
        chains: Mapping[str, tuple[int, ...]],
        grammar: Callable[[str], Grammar],
        markers: Markers,
        words: CheckWords,
    ) -> None:
        self._first = first
        self._chains = chains
        self._grammar = grammar
        self._markers = markers
        self._words = words
        self._output: list[Token | Verdict] = []
        self._ids: list[int] = []  # of the current attempt
        first.follow = self._check
        first.extra = 1 + len(words.common)  # the check's own tokens after the response

    def _check(self, generated: list[int]) -> Request:
        """The check of a finished attempt."""
        self._output += generated
        self._ids += generated
        response = self._ids[self._starts()[-1] :]
        ids = [*self._first.ids, *response, self._words.start, *self._words.common]
        return replace(self._first, ids=ids, limit=0, words=self._words.ids, follow=self._decide)

    def _decide(self, score: float) -> Request | list[Token | Verdict]:
        """The next deeper chain if the response does not pass and there is one, else the whole output."""
        safe = score >= self._words.threshold
        modes = list(self._chains)
        starts = self._starts()
        tried = tuple(self._markers.starts.index(self._ids[index]) for index in starts)
        depth = list(self._chains.values()).index(tried)
        verdict = Verdict(modes[depth], safe, score, self._words.words[0 if safe else 1])
        if safe or depth + 1 == len(modes):
            self._emit(verdict)
            return self._output
        deeper = modes[depth + 1]
        chain = self._chains[deeper]
        kept = next(i for i, (old, new) in enumerate(zip(tried, chain, strict=False)) if old != new)
        self._emit(replace(verdict, deeper=deeper, kept=kept))
        self._ids = [*self._ids[: starts[kept]], self._markers.starts[chain[kept]]]
        self._emit(self._ids[-1])
        sampling = self._first.sampling
        return replace(
            self._first,
            ids=[*self._first.ids, *self._ids],
            grammar=PrefixedGrammar(self._grammar(deeper), self._ids),
            limit=self._first.limit - len(self._ids),
            sampling=replace(sampling, seed=seed_of(sampling.seed, deeper)),
        )

    def _starts(self) -> list[int]:
        """Indices of the start markers."""
        return [index for index, id_ in enumerate(self._ids) if id_ in self._markers.starts]

    def _emit(self, output: Token | Verdict) -> None:
        self._output.append(output)
        if self._first.on_token is not None:
            self._first.on_token(output)
