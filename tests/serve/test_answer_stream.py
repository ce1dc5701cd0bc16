"""Deltas of an answer add up to its text however it is tokenised."""

from collections.abc import Iterator

import pytest

from mote.inference.events import Event
from mote.serve.answer_stream import AnswerStream
from mote.serve.openai_schema import StepEvent


class FixedEvents:
    """Events of a fixed answer; token i gives the i-th of them."""

    def __init__(self, events: list[Event]) -> None:
        self.events = events

    def token(self, id_: int) -> Iterator[Event]:
        yield self.events[id_]

    def end(self) -> Iterator[Event]:
        yield Event(kind="done", step="response", tokens=len(self.events))


def pieces(step: str, text: str, size: int) -> list[Event]:
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    return [
        Event(kind="begin", step=step),
        *(Event(kind="text", step=step, text=part) for part in parts),
        Event(kind="end", step=step, tokens=len(parts) + 2),
    ]


def streamed(events: list[Event], *stop: str) -> tuple[str, str, bool, list[str]]:
    """Reasoning, content, whether a stop string was found, and the kinds of the events."""
    stream = AnswerStream(FixedEvents(events), "response", stop)  # type: ignore[arg-type]
    choices = [choice for number in range(len(events)) for choice in stream.token(number)] + list(stream.end())
    kinds = [choice.mote.event for choice in choices if isinstance(choice.mote, StepEvent)]
    reasoning = "".join(choice.delta.reasoning_content or "" for choice in choices)
    return reasoning, "".join(choice.delta.content or "" for choice in choices), stream.stopped, kinds


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_whitespace_and_stops_do_not_depend_on_chunking(size: int) -> None:
    events = [
        *pieces("analysis", "  why? \n\n so. \n", size),
        *pieces("guidance", "\tdo  this STOP ", size),
        *pieces("response", "\n one  two \n STO three STOP four STOP ", size),
    ]
    thought = "why? \n\n so.\n\ndo  this STOP"
    assert streamed(events)[:3] == (thought, "one  two \n STO three STOP four STOP", False)
    assert streamed(events, "STOP")[:3] == (thought, "one  two \n STO three", True)
    assert streamed(events, "never", "three STOP", "STOP four")[:3] == (thought, "one  two \n STO", True)
    assert streamed(events, "one")[:3] == (thought, "", True)
    assert streamed(events, "STOPS")[1] == streamed(events)[1]


def test_empty_step_adds_no_separator_and_done_comes_last() -> None:
    events = [*pieces("analysis", " \n ", 1), *pieces("guidance", "go", 1), *pieces("response", "x END y", 2)]
    reasoning, content, stopped, kinds = streamed(events, "END")
    assert (reasoning, content, stopped) == ("go", "x", True)
    assert kinds.count("done") == 1 and kinds[-1] == "done" and kinds.count("begin") == 3
