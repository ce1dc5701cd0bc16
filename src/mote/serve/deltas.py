"""Token ids of an answer -> what is sent of it, piece by piece; the pieces add up to the whole answer's text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mote.inference.events import Event, Events, Item

_BETWEEN = "\n\n"  # two reasoning steps


@dataclass(frozen=True)
class Delta:
    """A piece of an answer: text of the reasoning or of the response, and the event that it came with."""

    event: Event
    reasoning: str = ""
    content: str = ""


class Deltas:
    """Tells an answer token by token. White space around a step is left out; text is held back while a stop may begin.

    Args:
        events: Of this answer.
        answer: Name of the step that the user reads.
        stop: Texts that end the response; they are not part of it.
    """

    def __init__(self, events: Events, answer: str, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._events, self._answer, self._stop = events, answer, tuple(stop)
        self._held, self._begun, self._reasoned = "", False, False

    def token(self, item: Item) -> Iterator[Delta]:
        """The pieces of one more token or verdict."""
        for event in self._events.token(item):
            yield from self._tell(event)

    def end(self) -> Iterator[Delta]:
        """The last pieces."""
        for event in self._events.end():
            yield from self._tell(event)

    def _tell(self, event: Event) -> Iterator[Delta]:
        if self.stopped and event.kind != "done":
            return
        if event.kind == "text":
            yield from self._text(event, False)
            return
        if event.kind != "begin":
            yield from self._text(Event(kind="text", step=event.step), True)
        self._held, self._begun = "", False
        if event.kind == "check":
            between, self._reasoned = _BETWEEN if self._reasoned else "", True
            yield Delta(event, reasoning=f"{between}{event.step}: {event.text} ({event.score:.2f})")
        else:
            yield Delta(event)

    def _text(self, event: Event, final: bool) -> Iterator[Delta]:
        self._held += event.text
        if not self._begun:
            self._held = self._held.lstrip()
        answers = event.step == self._answer
        if answers and (found := [at for stop in self._stop if (at := self._held.find(stop)) >= 0]):
            self._held, self.stopped, final = self._held[: min(found)], True, True
        ready = self._held if final else self._held[: len(self._held) - (self._unsure() if answers else 0)]
        text = ready.rstrip()
        self._held = "" if final else self._held[len(text) :]
        if not text:
            return
        if answers:
            yield Delta(event.model_copy(update={"text": text}), content=text)
        else:
            between = _BETWEEN if self._reasoned and not self._begun else ""
            yield Delta(event.model_copy(update={"text": text}), reasoning=between + text)
            self._reasoned = True
        self._begun = True

    def _unsure(self) -> int:
        """Length of the longest end of the held text that a stop begins with."""
        lengths = (
            length
            for stop in self._stop
            for length in range(min(len(stop) - 1, len(self._held)), 0, -1)
            if self._held.endswith(stop[:length])
        )
        return max(lengths, default=0)
