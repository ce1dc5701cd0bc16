"""Times of several variants that take turns in one process, and what they are over a reference.

Machines are noisy and drift: only what ran side by side is compared, round by round. A variant that is the reference
once more (A/A) shows how far from 1 a ratio comes by chance.
"""

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def interleave(actions: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each action returns in each round; every round begins with another one, every second runs backwards.

    Args:
        actions: Name -> what is measured; it returns its own seconds. It has been warmed up.
        rounds: How often each is called.
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
    """Median and quartiles of one over the other, round by round."""
    return spread([mine / its for mine, its in zip(one, other, strict=True)])


def compare(values: Mapping[str, Sequence[float]], references: Mapping[str, str]) -> dict[str, Any]:
    """For each variant its median, its rounds, and its ratio to each reference that was measured.

    Args:
        values: Variant -> its rounds.
        references: What to call a ratio -> the variant it is over.
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
    """One line of progress on stderr."""
    print(f"bench: {line}", file=sys.stderr, flush=True)
