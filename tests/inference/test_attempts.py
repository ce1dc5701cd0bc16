"""What is left of attempts, on hand-written ids."""

import pytest

from mote.inference.events import Checked, Item, Settled, settle
from mote.tokens.routing import Markers

MARKERS = Markers(starts=(10, 20, 30), ends=(11, 21, 31))
ANALYSIS, GUIDANCE, SHORT, LONG = [10, 1, 11], [20, 2, 2, 21], [30, 3, 31], [30, 4, 4, 31]


def verdict(depth: str, deeper: str = "", kept: int = 0) -> Checked:
    return Checked(depth, not deeper, 0.5, "safe", deeper, kept)


PASSED = verdict("full")
CASES: list[tuple[list[Item], Settled]] = [
    ([], Settled([], 0, [])),
    ([5, 6], Settled([5, 6], 0, [])),
    ([*ANALYSIS, *SHORT], Settled([*ANALYSIS, *SHORT], 0, [])),
    ([*SHORT, PASSED], Settled(SHORT, 0, [(PASSED, SHORT)])),
    (
        [*SHORT, first := verdict("direct", "analysis"), *ANALYSIS, *LONG, second := verdict("analysis", "full", 1),
         *GUIDANCE, *SHORT, PASSED],
        Settled([*ANALYSIS, *GUIDANCE, *SHORT], len(SHORT + LONG), [(first, SHORT), (second, LONG), (PASSED, SHORT)]),
    ),
    # One that was cut off behind an unsafe answer: nothing of that answer is left.
    ([*ANALYSIS, *SHORT, second, 20, 2], Settled([*ANALYSIS, 20, 2], len(SHORT), [(second, SHORT)])),
    # A chain that shares no step with the next one.
    ([*ANALYSIS, *SHORT, first, *GUIDANCE], Settled(GUIDANCE, len(ANALYSIS + SHORT), [(first, SHORT)])),
]  # fmt: skip


@pytest.mark.parametrize(("items", "settled"), CASES)
def test_dropped_answers_leave_the_steps_that_the_next_chain_keeps(items: list[Item], settled: Settled) -> None:
    found = settle(items, MARKERS)
    assert found == settled
    assert len(items) == len(found.ids) + found.dropped + len(found.checks)
