"""What is left of attempts, on hand-written ids."""

import pytest

from mote.inference.events import FinalChain, Token, Verdict, final_chain
from mote.tokens.routing import Markers

MARKERS = Markers(starts=(10, 20, 30), ends=(11, 21, 31))
ANALYSIS, GUIDANCE, SHORT, LONG = [10, 1, 11], [20, 2, 2, 21], [30, 3, 31], [30, 4, 4, 31]


def verdict(depth: str, deeper: str = "", kept: int = 0) -> Verdict:
    return Verdict(depth, not deeper, 0.5, "safe", deeper, kept)


PASSED = verdict("full")
CASES: list[tuple[list[Token | Verdict], FinalChain]] = [
    ([], FinalChain([], 0, [])),
    ([5, 6], FinalChain([5, 6], 0, [])),
    ([*ANALYSIS, *SHORT], FinalChain([*ANALYSIS, *SHORT], 0, [])),
    ([*SHORT, PASSED], FinalChain(SHORT, 0, [(PASSED, SHORT)])),
    (
        [*SHORT, first := verdict("direct", "analysis"), *ANALYSIS, *LONG, second := verdict("analysis", "full", 1),
         *GUIDANCE, *SHORT, PASSED],
        FinalChain(
            [*ANALYSIS, *GUIDANCE, *SHORT], len(SHORT + LONG), [(first, SHORT), (second, LONG), (PASSED, SHORT)]
        ),
    ),
    # One that was cut off behind an unsafe answer: nothing of that answer is left.
    ([*ANALYSIS, *SHORT, second, 20, 2], FinalChain([*ANALYSIS, 20, 2], len(SHORT), [(second, SHORT)])),
    # A chain that shares no step with the next one.
    ([*ANALYSIS, *SHORT, first, *GUIDANCE], FinalChain(GUIDANCE, len(ANALYSIS + SHORT), [(first, SHORT)])),
]  # fmt: skip


@pytest.mark.parametrize(("output", "final"), CASES)
def test_final_chain_drops_what_deeper_chains_replace(output: list[Token | Verdict], final: FinalChain) -> None:
    found = final_chain(output, MARKERS)
    assert found == final
    assert len(output) == len(found.ids) + found.dropped + len(found.checks)
