"""Slots of a `graniteswitch` file: which number each start marker gets.

llama.cpp reads a token with the experts of one slot: the mean of the numbers of all start markers up to it, 0 where
there is none. A plan gives the markers numbers such that this mean is always a slot of the token's own step.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from mote.core.scheme import Chain

MOST_SLOTS = 32  # each slot costs as much memory as a LoRA of all layers


@dataclass(frozen=True)
class SlotPlan:
    """The slots of a file.

    Attributes:
        markers: Step -> number of its start marker.
        steps: Slot -> step whose experts it holds; slot 0 is the question's and is not listed.
        base: The slot of the base model, whose experts are zero.
        count: The highest slot.
    """

    markers: dict[str, int]
    steps: dict[int, str]
    base: int
    count: int


def slot_plan(chains: Iterable[Chain], most: int = MOST_SLOTS) -> SlotPlan | None:
    """The plan with the fewest slots, or None if there is none with at most `most`.

    Args:
        chains: Every chain of steps that an answer may consist of.
        most: Highest slot allowed.
    """
    chains = tuple(chains)
    prefixes = {chain[:length] for chain in chains for length in range(1, len(chain) + 1)}
    order = list(dict.fromkeys(step for prefix in sorted(prefixes, key=len) for step in prefix))
    # A prefix can be checked as soon as the last of its steps has a number.
    checks = [[p for p in prefixes if step in p and set(p) <= set(order[: i + 1])] for i, step in enumerate(order)]
    for highest in range(len(order), most + 1):
        for markers, steps in _assign(order, checks, {}, {}, highest):
            free = (slot for slot in count(1) if slot not in steps and slot not in markers.values())
            base = next(free)
            if base <= highest:
                return SlotPlan(markers, steps, base, highest)
    return None


def _assign(
    order: Sequence[str], checks: list[list[Chain]], markers: dict[str, int], steps: dict[int, str], highest: int
) -> Iterator[tuple[dict[str, int], dict[int, str]]]:
    """Every way to number the steps after those in `markers`."""
    if len(markers) == len(order):
        yield markers, steps
        return
    step = order[len(markers)]
    for number in range(1, highest + 1):
        if number in markers.values():
            continue
        tried = {**markers, step: number}
        found = _slots(checks[len(markers)], tried, steps)
        if found is not None:
            yield from _assign(order, checks, tried, found, highest)


def _slots(prefixes: list[Chain], markers: dict[str, int], steps: dict[int, str]) -> dict[int, str] | None:
    """The slots with those of these prefixes added; None if a mean is no whole number or another step's slot."""
    steps = dict(steps)
    for prefix in prefixes:
        slot, rest = divmod(sum(markers[step] for step in prefix), len(prefix))
        if rest or steps.setdefault(slot, prefix[-1]) != prefix[-1]:
            return None
    return steps
