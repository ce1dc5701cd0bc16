"""Events of one answer, token by token."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mote.core.records import Frozen
from mote.core.scheme import CHECK, Chain
from mote.tokens.routing import Markers

Token = int


@dataclass(frozen=True)
class Verdict:
    """The trained check's verdict on the response before it, p(c|y,x) of section 3.1.

    Attributes:
        depth: Mode whose chain was tried.
        safe: Whether the response passes.
        score: Probability of the word for a response that passes, against the other word.
        word: The verdict.
        deeper: Mode whose chain is tried next; empty if the response is final.
        kept: Number of steps of the tried chain that the deeper one continues from.
    """

    depth: str
    safe: bool
    score: float
    word: str
    deeper: str = ""
    kept: int = 0


@dataclass(frozen=True)
class FinalChain:
    """What remains of all attempts.

    Attributes:
        ids: Of the chain whose response is given.
        dropped: Number of tokens that are no longer part of it.
        checks: The verdicts, each with the ids of the response it judges.
    """

    ids: list[int]
    dropped: int
    checks: list[tuple[Verdict, list[int]]]


def final_chain(output: Sequence[Token | Verdict], markers: Markers) -> FinalChain:
    """Drop the steps that an unsafe response discarded."""
    steps: list[list[int]] = []
    dropped = 0
    checks = []
    for item in output:
        if isinstance(item, Verdict):
            checks.append((item, steps[-1]))
            if item.deeper:
                dropped += sum(map(len, steps[item.kept :]))
                steps = steps[: item.kept]
        elif item in markers.starts or not steps:
            steps.append([item])
        else:
            steps[-1].append(item)
    return FinalChain([id_ for step in steps for id_ in step], dropped, checks)


class Event(Frozen):
    """A step begins, its text grows, it ends, all is done; `tokens` counts the step's tokens, for `done` all of them.

    With a self-check, `draft` announces a response whose text is held back, `check` is its verdict (`text`: the word),
    and `again` announces a deeper chain (`text` is the mode). The response that is given follows its check.
    """

    kind: Literal["begin", "text", "end", "done", "draft", "check", "again"]
    step: str
    text: str = ""
    tokens: int = 0
    safe: bool | None = None
    score: float | None = None


class Events:
    """Turns the tokens of one answer into events; text is emitted once it can no longer change.

    Args:
        tokenizer: Of the model.
        markers: Markers of the steps.
        experts: Names of the steps.
        step: The response's step, which text without markers belongs to.
        checks: Whether responses are checked: their text is held back until then.
        stop_ids: Ids that end a turn and are no text.
    """

    def __init__(
        self,
        tokenizer: Any,
        markers: Markers,
        experts: Chain,
        step: str,
        checks: bool = False,
        stop_ids: Collection[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._markers = markers
        self._experts = experts
        self._step = step
        self._stop_ids = frozenset(stop_ids)
        self._checked_step = step if checks else None
        self._ids: list[int] = []
        self._emitted = ""
        self._total = 0
        self._held_back = False

    def token(self, token: Token | Verdict) -> Iterator[Event]:
        """The events of one more token, or of a verdict."""
        self._total += 1
        if isinstance(token, Verdict):
            yield from self._verdict(token)
        elif token in self._markers.starts:
            self._step = self._experts[self._markers.starts.index(token)]
            self._ids = []
            self._emitted = ""
            self._held_back = self._step == self._checked_step
            yield Event(kind="draft" if self._held_back else "begin", step=self._step)
        elif token in self._markers.ends:
            if not self._held_back:
                yield from self._end()
        elif token not in self._stop_ids:
            self._ids.append(token)
            yield from self._text()

    def end(self) -> Iterator[Event]:
        """The last events."""
        yield from self._text(final=True)
        yield Event(kind="done", step=self._step, tokens=self._total)

    def _verdict(self, verdict: Verdict) -> Iterator[Event]:
        score = round(verdict.score, 4)
        yield Event(kind="check", step=CHECK, text=verdict.word, tokens=1, safe=verdict.safe, score=score)
        if verdict.deeper:
            yield Event(kind="again", step=CHECK, text=verdict.deeper)
        else:
            self._held_back = False
            yield Event(kind="begin", step=self._step)
            yield from self._end()

    def _end(self) -> Iterator[Event]:
        yield from self._text(final=True)
        yield Event(kind="end", step=self._step, tokens=len(self._ids) + 2)

    def _text(self, final: bool = False) -> Iterator[Event]:
        if self._held_back:
            return
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if not final and text.endswith("\ufffd"):  # a character of several tokens
            return
        if len(text) > len(self._emitted):
            yield Event(kind="text", step=self._step, text=text[len(self._emitted) :])
            self._emitted = text
