"""Interleaved timing of several variants in one process, and ratios to a reference.

Machines are noisy and drift, so ratios are taken round by round. Measuring the reference twice (an A/A control) shows
how far from 1 a ratio is by chance.
"""

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def interleave(actions: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Results of each action per round; the order rotates each round and is reversed every second round.

    Args:
        actions: Name -> a warmed-up callable that returns its own seconds.
        rounds: Calls of each.
    """
    names = list(actions)
    values: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        start = turn % len(names)
        order = names[start:] + names[:start]
        for name in order if turn % 2 == 0 else reversed(order):
            values[name].append(actions[name]())
    return values


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median and quartiles."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return dict(zip(("lower", "median", "upper"), (round(value, digits) for value in quartiles), strict=True))


def paired(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratio one / other, round by round."""
    return spread([above / below for above, below in zip(one, other, strict=True)])


def compare(values: Mapping[str, Sequence[float]], references: Mapping[str, str]) -> dict[str, Any]:
    """Median, rounds and ratios of each variant.

    Args:
        values: Variant -> its rounds.
        references: Name of a ratio -> the variant in its denominator; ignored if that was not measured.
    """
    return {
        name: {
            "median": round(statistics.median(rounds), 6),
            **{ratio: paired(rounds, values[over]) for ratio, over in references.items() if over in values},
            "rounds": [round(value, 6) for value in rounds],
        }
        for name, rounds in values.items()
    }


def say(line: str) -> None:
    """Print a progress line to stderr."""
    print(f"bench: {line}", file=sys.stderr, flush=True)
