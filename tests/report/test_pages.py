"""How pages write numbers, and data that cannot end its element."""

import json

import pytest

from mote.evals.statistics import Estimate, Paired
from mote.report.pages import as_data, change, interval, measured, p_value, seconds


@pytest.mark.parametrize(
    ("metric", "value", "shown", "changed"),
    [
        ("refusal", 0.125, "12.5\u202f%", "+12.5\u202fpoints"),
        ("goodness@0.1", 0.5, "50.0\u202f%", "+50.0\u202fpoints"),
        ("harm-help", 7.25, "7.25", "+7.25"),
        ("tokens", 51.25, "51.2", "+51.2"),
        ("loss, held out: all", 1.5, "1.50", "+1.50"),
        ("refusal", None, "–", "–"),  # noqa: RUF001
    ],
)
def test_metrics_are_formatted_in_their_unit(metric: str, value: float | None, shown: str, changed: str) -> None:
    assert (measured(value, metric), change(value, metric)) == (shown, changed)


def test_intervals_are_formatted() -> None:
    number = Estimate(value=0.5, low=0.25, high=0.75, n=4, method="wilson")
    difference = Paired(difference=0.1, low=-0.05, high=0.25, p=0.2, test="mcnemar", n=4)
    assert interval(number, "refusal") == "[25.0, 75.0]"
    assert interval(difference, "refusal") == "[\u22125.0, +25.0]"
    assert interval(number.model_copy(update={"low": None}), "refusal") == "–"  # noqa: RUF001
    assert [p_value(p) for p in (None, 0.0004, 0.04)] == ["–", "< 0.001", "0.040"]  # noqa: RUF001
    assert seconds(3700) == "1\u202fh 1\u202fmin"


def test_embedded_data_round_trips_and_closes_no_element() -> None:
    nasty = {"a": "</script><script>alert(1)</script> <!-- \u2028\u2029 שלום"}
    text = as_data(nasty)
    assert json.loads(text) == nasty and not {"<", "\u2028", "\u2029"} & set(text)
