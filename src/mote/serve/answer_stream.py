"""Tokens of one answer -> the choices of stream chunks; their texts add up to the whole answer."""

from collections.abc import Iterator, Sequence
from typing import Any

from mote.inference.events import Event, Events, Token, Verdict
from mote.serve.openai_schema import ChunkChoice, Delta, StepEvent

_SEPARATOR = "\n\n"  # between two reasoning steps


class AnswerStream:
    """Splits an answer into reasoning and content as its tokens arrive.

    Whitespace around a step is stripped; text is held back while it may be the beginning of a stop string.

    Args:
        events: Turns this answer's tokens into events.
        answer_step: Name of the step that the user reads: its text is content, all other text is reasoning.
        stop: Strings that end the response and are not part of it.
        index: Index of the answer among those of its request.

    Attributes:
        stopped: Whether a stop string was found.
    """

    def __init__(self, events: Events, answer_step: str, stop: Sequence[str] = (), index: int = 0) -> None:
        self.stopped = False
        self._events = events
        self._answer_step = answer_step
        self._stop = tuple(stop)
        self._index = index
        self._held = ""
        self._begun = False  # whether text of the current step was given
        self._reasoned = False  # whether any reasoning was given

    def token(self, item: Token | Verdict) -> Iterator[ChunkChoice]:
        """The choices that one more token or verdict adds."""
        for event in self._events.token(item):
            yield from self._choices(event)

    def end(self) -> Iterator[ChunkChoice]:
        """The last choices; the very last has the event `done`."""
        for event in self._events.end():
            yield from self._choices(event)

    def _choices(self, event: Event) -> Iterator[ChunkChoice]:
        if self.stopped and event.kind != "done":
            return
        if event.kind == "text":
            yield from self._text(event, False)
            return
        if event.kind != "begin":
            yield from self._text(Event(kind="text", step=event.step), True)
        self._held = ""
        self._begun = False
        if event.kind == "check":
            verdict = f"{event.step}: {event.text} ({event.score:.2f})"
            yield self._choice(event, Delta(reasoning_content=self._separated(verdict)))
        else:
            yield self._choice(event, Delta())

    def _text(self, event: Event, final: bool) -> Iterator[ChunkChoice]:
        self._held += event.text
        if not self._begun:
            self._held = self._held.lstrip()
        answers = event.step == self._answer_step
        if answers and (found := [at for stop in self._stop if (at := self._held.find(stop)) >= 0]):
            self._held = self._held[: min(found)]
            self.stopped = True
            final = True
        ready = self._held if final else self._held[: len(self._held) - (self._undecided() if answers else 0)]
        text = ready.rstrip()
        self._held = "" if final else self._held[len(text) :]
        if not text:
            return
        if answers:
            yield self._choice(event, Delta(content=text))
        else:
            yield self._choice(event, Delta(reasoning_content=text if self._begun else self._separated(text)))
        self._begun = True

    def _separated(self, reasoning: str) -> str:
        separator = _SEPARATOR if self._reasoned else ""
        self._reasoned = True
        return separator + reasoning

    def _undecided(self) -> int:
        """Length of the longest suffix of the held text that a stop string begins with."""
        lengths = (
            length
            for stop in self._stop
            for length in range(min(len(stop) - 1, len(self._held)), 0, -1)
            if self._held.endswith(stop[:length])
        )
        return max(lengths, default=0)

    def _choice(self, event: Event, delta: Delta) -> ChunkChoice:
        verdict: dict[str, Any] = {}
        if event.kind == "check":
            verdict = {"verdict": event.text, "safe": event.safe, "score": event.score}
        elif event.kind == "again":
            verdict = {"deeper": event.text}
        answer = event.step == self._answer_step
        told = StepEvent(event=event.kind, step=event.step, answer=answer, tokens=event.tokens, **verdict)
        return ChunkChoice(index=self._index, delta=delta, finish_reason=None, mote=told)
