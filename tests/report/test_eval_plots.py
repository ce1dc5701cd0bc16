"""Plots of an evaluation."""

import re

from mote.evals.statistics import Estimate
from mote.report.eval_plots import classes, curve
from mote.report.evaluation import Point


def point(system: str, mode: str, tokens: float, score: float | None) -> Point:
    low, high = (None, None) if score is None else (max(0.0, score - 0.1), min(1.0, score + 0.1))
    return Point(
        task="hh-harm",
        metric="harmless",
        system=system,
        mode=mode,
        tokens=Estimate(value=tokens, low=tokens, high=tokens, n=9, method="bootstrap"),
        score=Estimate(value=score, low=low, high=high, n=9, method="wilson"),
    )


POINTS = [point("base", "base", 40, 0.5), point("ours", "full", 200, 0.9), point("ours", "full@64", 120, 0.8)]


def test_curve_shows_system_colours_and_budgets() -> None:
    svg = curve(POINTS, ["base", "ours"], "curve0", "Harmless answers (hh-harm)", rated=False)
    assert set(re.findall(r"var\(--(system-\d)\)", svg)) == {"system-1", "system-2"}
    texts = re.findall(r">([^<>]+)</text>", svg)
    assert {"64", "base", "full", "Harmless answers (hh-harm), %", "mean tokens per answer"} <= set(texts)
    assert not re.search(r"#[0-9a-f]{6}\b", svg) and 'id="curve0-' in svg
    assert svg == curve(POINTS, ["base", "ours"], "curve0", "Harmless answers (hh-harm)", rated=False)


def test_missing_number_has_no_point() -> None:
    without = curve([*POINTS[:2], point("ours", "adaptive", 90, None)], ["base", "ours"], "c", "Harmless", rated=False)
    with_it = curve([*POINTS[:2], point("ours", "adaptive", 90, 0.7)], ["base", "ours"], "c", "Harmless", rated=False)
    assert without.count("<use") < with_it.count("<use")


def test_classes_are_stacked_to_100_percent() -> None:
    shares = {"full_compliance": 0.25, "partial_refusal": 0.25, "full_refusal": 0.5}
    svg = classes({"base · base": shares, "ours · full": shares}, "classes-benign", "Safe prompts")
    widths: dict[str, float] = {}
    for left, right, colour in re.findall(r'd="M ([\d.]+) [\d.]+ \nL ([\d.]+) [^"]*"[^>]*fill: (var[^;"]+)', svg):
        widths[colour] = widths.get(colour, 0.0) + float(right) - float(left)
    assert "ours · full" in svg and len(widths) == 3
    assert abs(widths["var(--muted)"] / widths["var(--analysis)"] - 2) < 0.01
