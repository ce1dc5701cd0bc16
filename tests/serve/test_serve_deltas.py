"""Pieces of an answer: they add up, whatever the tokens they came in."""

from collections.abc import Iterator

import pytest

from mote.inference.events import Event
from mote.serve.deltas import Deltas


class Told:
    """Events of a written-down answer: each number is one of its events."""

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


def told(events: list[Event], *stop: str) -> tuple[str, str, bool, list[str]]:
    deltas = Deltas(Told(events), "response", stop)  # type: ignore[arg-type]
    found = [delta for number in range(len(events)) for delta in deltas.token(number)] + list(deltas.end())
    kinds = [delta.event.kind for delta in found]
    return "".join(d.reasoning for d in found), "".join(d.content for d in found), deltas.stopped, kinds


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_white_space_and_stops_do_not_depend_on_the_pieces(size: int) -> None:
    events = [
        *pieces("analysis", "  why? \n\n so. \n", size),
        *pieces("guidance", "\tdo  this STOP ", size),
        *pieces("response", "\n one  two \n STO three STOP four STOP ", size),
    ]
    thought = "why? \n\n so.\n\ndo  this STOP"
    assert told(events)[:3] == (thought, "one  two \n STO three STOP four STOP", False)
    assert told(events, "STOP")[:3] == (thought, "one  two \n STO three", True)
    assert told(events, "never", "three STOP", "STOP four")[:3] == (thought, "one  two \n STO", True)
    assert told(events, "one")[:3] == (thought, "", True)
    assert told(events, "STOPS")[1] == told(events)[1]


def test_an_empty_step_leaves_no_gap_and_done_is_always_last() -> None:
    events = [*pieces("analysis", " \n ", 1), *pieces("guidance", "go", 1), *pieces("response", "x END y", 2)]
    reasoning, content, stopped, kinds = told(events, "END")
    assert (reasoning, content, stopped) == ("go", "x", True)
    assert kinds.count("done") == 1 and kinds[-1] == "done" and kinds.count("begin") == 3
