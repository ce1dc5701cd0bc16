"""Against values known from elsewhere: R, scipy, and by hand."""

import math

import numpy as np
import pytest

from mote.evals.statistics import estimate, goodness, mcnemar, mean, paired, share, wilson, worst


def test_wilson_against_published_values() -> None:
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I, method 3
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)
    assert wilson(29, 29)[1] == 1.0


def test_shares_of_nothing_are_no_number() -> None:
    assert share([]).value is None and mean([]).low is None and mean([]).n == 0


def test_mcnemar_against_the_binomial_test() -> None:
    assert mcnemar(5, 15) == pytest.approx(0.04138947, abs=1e-7)  # binom.test(5, 20) of R
    assert mcnemar(0, 5) == pytest.approx(0.0625)
    assert mcnemar(7, 7) == 1.0 and mcnemar(0, 0) == 1.0


def test_bootstrap_interval_matches_the_standard_error() -> None:
    draw = np.random.default_rng(3)
    scores = draw.normal(5, 2, 400).tolist()
    found = mean(scores)
    half = 1.96 * np.std(scores, ddof=1) / math.sqrt(len(scores))
    assert found.value is not None and found.low is not None and found.high is not None
    assert found.low == pytest.approx(found.value - half, abs=0.03)
    assert found.high == pytest.approx(found.value + half, abs=0.03)
    assert mean(scores) == found and mean(scores, seed=1) != found


def test_binary_scores_use_wilson_others_the_bootstrap() -> None:
    assert estimate([0, 1, 1.0]).method == "wilson" and estimate([0, 0.5]).method == "bootstrap"


def test_pairs_are_of_the_same_prompts() -> None:
    first = {str(i): float(i % 2) for i in range(40)} | {"only here": 0.0}
    second = {str(i): 1.0 for i in range(40)}
    found = paired(first, second)
    assert (found.n, found.difference, found.test) == (40, 0.5, "mcnemar")
    assert found.p == pytest.approx(2 / 2**20)
    assert paired({"a": 1.0}, {"b": 1.0}).p is None


def test_a_single_prompt_has_no_interval() -> None:
    assert mean([0.679]).model_dump(include={"low", "high"}) == {"low": None, "high": None}
    alone = paired({"a": 0.25}, {"a": 0.75})
    assert (alone.difference, alone.low, alone.high, alone.p) == (0.5, None, None, None)
    binary = paired({"a": 0.0}, {"a": 1.0})
    assert (binary.low, binary.high, binary.p) == (None, None, 1.0)  # McNemar's test needs no spread


def test_paired_test_is_more_powerful_than_unpaired() -> None:
    draw = np.random.default_rng(0)
    hard = draw.normal(5, 3, 60)  # prompts differ by much more than the systems do
    first = {str(i): float(x) for i, x in enumerate(hard)}
    second = {str(i): float(x + 0.3 + draw.normal(0, 0.3)) for i, x in enumerate(hard)}
    found = paired(first, second)
    assert found.test == "paired bootstrap" and found.p is not None and found.p < 0.01
    assert found.low is not None and found.low > 0
    same = paired(first, {key: first[key] + float(draw.normal(0, 0.3)) for key in first})
    assert same.p is not None and same.p > 0.01


def test_the_worst_tenth_is_rounded_up() -> None:
    scores = [0.9, 0.1, 1.0, 0.5, 0.7, 0.6, 1.0, 1.0, 1.0, 1.0]
    assert worst(scores, 0.1) == 0.1
    assert worst([*scores, 0.3], 0.1) == pytest.approx(0.2)  # 1.1 techniques are two
    assert worst([*scores, *scores], 0.1) == 0.1
    assert worst(scores, 1.0) == pytest.approx(0.78)
    with pytest.raises(ValueError, match="needs at least 10 techniques"):
        worst(scores[:9], 0.1)


def test_goodness_leaves_out_prompts_with_too_few_techniques() -> None:
    assert goodness({"a": [1.0] * 10, "b": [0.0, *[1.0] * 9], "c": [0.0] * 9}, 0.1) == {"a": 1.0, "b": 0.0}
