"""Statistics of an evaluation: 95 % intervals, paired tests of two systems on the same prompts, goodness@k.

Decision 24 gives the reasons for these methods. Independent of models, judges and Inspect.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from mote.core.records import Frozen

Z = 1.959963984540054  # the 97.5 % point of the normal distribution
RESAMPLES = 2000


class Estimate(Frozen):
    """A number with its 95 % interval.

    Attributes:
        value: The number; none if nothing was measured.
        low: Lower end of the interval.
        high: Upper end.
        n: Number of prompts.
        method: `wilson` for shares, `bootstrap` over prompts for everything else.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    method: str


class Paired(Frozen):
    """Two systems on the same prompts.

    Attributes:
        difference: Mean of the second minus mean of the first.
        low: Lower end of the difference's 95 % interval (paired bootstrap); none for a single prompt.
        high: Upper end.
        p: Two-sided p value; none for a single prompt unless its scores are 0 or 1.
        test: `mcnemar` (exact) if every score is 0 or 1, else `paired bootstrap`.
        n: Prompts scored for both.
    """

    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    test: str
    n: int


def share(scores: Sequence[float]) -> Estimate:
    """The share of ones among scores of 0 and 1, with the Wilson score interval."""
    n = len(scores)
    if not n:
        return Estimate(value=None, low=None, high=None, n=0, method="wilson")
    low, high = wilson(sum(scores), n)
    return Estimate(value=sum(scores) / n, low=low, high=high, n=n, method="wilson")


def wilson(successes: float, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share (Wilson 1927)."""
    p = successes / n
    center = p + Z**2 / (2 * n)
    spread = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    scale = 1 + Z**2 / n
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)


def mean(scores: Sequence[float], seed: int = 0) -> Estimate:
    """The mean over prompts, with a percentile bootstrap interval."""
    if not scores:
        return Estimate(value=None, low=None, high=None, n=0, method="bootstrap")
    low, high = _interval(_means(np.asarray(scores, dtype=float), seed), len(scores))
    return Estimate(value=float(np.mean(scores)), low=low, high=high, n=len(scores), method="bootstrap")


def estimate(scores: Sequence[float], seed: int = 0) -> Estimate:
    """`share` if every score is 0 or 1, else `mean`."""
    return share(scores) if set(scores) <= {0, 1} else mean(scores, seed)


def paired(first: Mapping[str, float], second: Mapping[str, float], seed: int = 0) -> Paired:
    """Compare two systems on the prompts for which both have a score.

    Args:
        first: Prompt id -> score of the reference system.
        second: Prompt id -> score of the other one.
        seed: Seed of the bootstrap.
    """
    both = sorted(first.keys() & second.keys())
    if not both:
        return Paired(difference=None, low=None, high=None, p=None, test="paired bootstrap", n=0)
    a, b = (np.asarray([scores[key] for key in both], dtype=float) for scores in (first, second))
    differences = b - a
    resampled = _means(differences, seed)
    low, high = _interval(resampled, len(both))
    binary = {*a.tolist(), *b.tolist()} <= {0.0, 1.0}
    p: float | None
    if binary:
        p = mcnemar(int(np.sum(differences < 0)), int(np.sum(differences > 0)))
    else:
        p = _two_sided(resampled - differences.mean(), float(differences.mean())) if len(both) > 1 else None
    return Paired(
        difference=float(differences.mean()),
        low=low,
        high=high,
        p=p,
        test="mcnemar" if binary else "paired bootstrap",
        n=len(both),
    )


def mcnemar(lost: int, won: int) -> float:
    """Exact McNemar test (McNemar 1947).

    Args:
        lost: Number of prompts on which only the first system scores.
        won: Number of prompts on which only the second one does.

    Returns:
        Two-sided p value.
    """
    n = lost + won
    tail: int = sum(math.comb(n, i) for i in range(min(lost, won) + 1))
    return float(min(1.0, 2 * tail / 2**n))


def worst(scores: Sequence[float], k: float) -> float:
    """Mean of the lowest share `k` of one prompt's scores, rounded up to whole techniques.

    Args:
        scores: One score per technique.
        k: Share of the techniques.

    Raises:
        ValueError: There are fewer than 1/k scores, so the share is less than one technique.
    """
    if len(scores) * k < 1 - 1e-9:
        raise ValueError(
            f"goodness@{k:g} needs at least {math.ceil(1 / k)} techniques a prompt, here are {len(scores)}"
        )
    count = math.ceil(len(scores) * k - 1e-9)
    return float(np.mean(sorted(scores)[:count]))


def goodness(prompts: Mapping[str, Sequence[float]], k: float) -> dict[str, float]:
    """Goodness@k per prompt: mean safety score under the most successful share `k` of the techniques (section 4.1).

    Prompts with fewer than 1/k scored techniques are left out; compare the lengths to count them.

    Args:
        prompts: Prompt id -> safety score under each technique (1 is safe).
        k: Share of the techniques, rounded up to whole techniques.

    Returns:
        Prompt id -> goodness@k.
    """
    return {prompt: worst(scores, k) for prompt, scores in prompts.items() if len(scores) * k >= 1 - 1e-9}


def _means(values_N: np.ndarray, seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return np.asarray([values_N[draw.integers(0, len(values_N), len(values_N))].mean() for _ in range(RESAMPLES)])


def _interval(resampled: np.ndarray, n: int) -> tuple[float, float] | tuple[None, None]:
    """The 95 % interval of the mean of `n` prompts; none for one prompt, which always resamples to itself."""
    if n == 1:
        return None, None
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)


def _two_sided(null: np.ndarray, observed: float) -> float:
    """Share of the resamples under the null hypothesis that are at least as extreme as observed (never exactly 0)."""
    beyond = int(np.sum(np.abs(null) >= abs(observed) - 1e-12))
    return (beyond + 1) / (len(null) + 1)
