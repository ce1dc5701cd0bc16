"""What happens while an answer is written, told token by token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mote.core.records import Frozen
from mote.core.scheme import CHECK, Chain
from mote.tokens.routing import Markers


@dataclass(frozen=True)
class Checked:
    """The verdict of the trained check on the answer before it, p(c|y,x) of section 3.1.

    Attributes:
        depth: The mode whose chain was tried.
        safe: Whether the answer passes.
        score: Probability of the word for an answer that passes, against the other word.
        word: The verdict.
        deeper: The mode whose chain is tried next; empty where the answer is given as it is.
        kept: Steps of the tried chain that this one goes on from.
    """

    depth: str
    safe: bool
    score: float
    word: str
    deeper: str = ""
    kept: int = 0


Item = int | Checked  # a token, or the verdict on what is before it


@dataclass(frozen=True)
class Settled:
    """What is left of all attempts.

    Attributes:
        ids: Of the chain whose answer is given.
        dropped: Tokens that no longer belong to it.
        checks: The verdicts, each with the ids of the answer it is on.
    """

    ids: list[int]
    dropped: int
    checks: list[tuple[Checked, list[int]]]


def settle(items: Sequence[Item], markers: Markers) -> Settled:
    """Leave out the steps that an unsafe answer has dropped."""
    steps: list[list[int]] = []
    dropped, checks = 0, []
    for item in items:
        if isinstance(item, Checked):
            checks.append((item, steps[-1]))
            if item.deeper:
                dropped += sum(map(len, steps[item.kept :]))
                steps = steps[: item.kept]
        elif item in markers.starts or not steps:
            steps.append([item])
        else:
            steps[-1].append(item)
    return Settled([id_ for step in steps for id_ in step], dropped, checks)


class Event(Frozen):
    """A step begins, text comes, a step ends, all is done; `tokens` counts the step's, of `done` all.

    Where the answer is checked, `draft` says that one is begun whose text is held back, `check` is the verdict on it
    (`text` its word), and `again` says that a deeper chain begins (`text` its mode). An answer that is given follows
    its check.
    """

    kind: Literal["begin", "text", "end", "done", "draft", "check", "again"]
    step: str
    text: str = ""
    tokens: int = 0
    safe: bool | None = None
    score: float | None = None


class Events:
    """Turns what is written into events; text is given once it can no longer change.

    Args:
        tokenizer: Of the model.
        markers: The steps' markers.
        experts: The steps' names.
        step: The answer's step, to which text without markers belongs.
        checks: Whether answers are checked: no text of theirs is given before.
    """

    def __init__(self, tokenizer: Any, markers: Markers, experts: Chain, step: str, checks: bool = False) -> None:
        self._tokenizer, self._markers, self._experts, self._step = tokenizer, markers, experts, step
        self._checked = step if checks else None
        self._ids: list[int] = []
        self._shown = ""
        self._total = 0
        self._held = False

    def token(self, item: Item) -> Iterator[Event]:
        """The events of one more token, or of a verdict."""
        self._total += 1
        if isinstance(item, Checked):
            yield from self._verdict(item)
        elif item in self._markers.starts:
            self._step = self._experts[self._markers.starts.index(item)]
            self._ids, self._shown, self._held = [], "", self._step == self._checked
            yield Event(kind="draft" if self._held else "begin", step=self._step)
        elif item in self._markers.ends:
            if not self._held:
                yield from self._end()
        else:
            self._ids.append(item)
            yield from self._text()

    def end(self) -> Iterator[Event]:
        """The last events."""
        yield from self._text(final=True)
        yield Event(kind="done", step=self._step, tokens=self._total)

    def _verdict(self, checked: Checked) -> Iterator[Event]:
        yield Event(
            kind="check", step=CHECK, text=checked.word, tokens=1, safe=checked.safe, score=round(checked.score, 4)
        )
        if checked.deeper:
            yield Event(kind="again", step=CHECK, text=checked.deeper)
        else:
            self._held = False
            yield Event(kind="begin", step=self._step)
            yield from self._end()

    def _end(self) -> Iterator[Event]:
        yield from self._text(final=True)
        yield Event(kind="end", step=self._step, tokens=len(self._ids) + 2)

    def _text(self, final: bool = False) -> Iterator[Event]:
        if self._held:
            return
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if not final and text.endswith("\ufffd"):  # a character of several tokens
            return
        if len(text) > len(self._shown):
            yield Event(kind="text", step=self._step, text=text[len(self._shown) :])
            self._shown = text
