"""What an answer that checks itself is made of: the ids of its attempts, and the verdict behind each of them."""

from collections.abc import Sequence
from dataclasses import dataclass

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
