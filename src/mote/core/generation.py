"""How a text is generated: its token budgets, how its tokens are sampled, and the seed of each request."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Token budgets of one answer.

    Attributes:
        max_step_tokens: Budget of one step; the step is then closed and the answer continues.
        max_tokens: Budget of the whole answer, markers included; half of it is reserved for the response. None: no such
            budget.
    """

    max_step_tokens: int = 256
    max_tokens: int | None = None


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled.

    Attributes:
        temperature: 0 is greedy.
        top_p: Nucleus: the fewest most likely tokens that hold this much of the probability.
        seed: Seed of the draws.
    """

    temperature: float = 0.0
    top_p: float = 0.95
    seed: int = 0


GREEDY = Sampling()


def seed_of(*parts: object) -> int:
    """A request's seed, below 2**63; depends only on these parts, not on the machine or the order of requests."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 1
