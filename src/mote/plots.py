"""The report's plots: plain numbers in, one inline SVG out.

matplotlib draws with placeholder colours; they become CSS variables of the page, so that one plot serves
light and dark.
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Points = Sequence[tuple[int, float]]

HUES = ("analysis", "guidance", "response", "check")  # the steps that have a colour of their own
WIDTH, FONT = 400, 11.5  # in SVG units: on a phone a unit is a little under a pixel, on a desktop a little above
TEXT, LINE, MUTED, PAGE = "#010101", "#010102", "#010103", "#010104"
STEP = {"analysis": "#010201", "guidance": "#010202", "response": "#010203", "check": "#010204"}
CSS = {
    TEXT: "currentColor",
    LINE: "var(--line)",
    MUTED: "var(--muted)",
    PAGE: "var(--page)",
    **{placeholder: f"var(--{step})" for step, placeholder in STEP.items()},
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": FONT,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), TEXT),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), LINE),
    **{f"axes.spines.{side}": False for side in ("top", "right", "left")},
    "axes.axisbelow": True,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.formatter.useoffset": False,
}
MARKERS = {"all": "o", "analysis": "s", "guidance": "^", "response": "D", "check": "v"}


def hue(step: str) -> str:
    """CSS name of a step's colour; a step of another scheme gets the neutral one."""
    return step if step in HUES else "other"


def shares(found: Mapping[str, float], paper: Mapping[str, float]) -> str:
    """Bars: which share of the chains has each step; a tick on the bar marks the paper's share."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(26 * len(found) + 50)
        for row, (step, share) in enumerate(found.items()):
            axes.barh(row, 100 * share, height=0.6, color=STEP.get(step, MUTED))
            if step in paper:
                axes.plot([100 * paper[step]] * 2, [row - 0.42, row + 0.42], color=PAGE, linewidth=5)
                axes.plot([100 * paper[step]] * 2, [row - 0.42, row + 0.42], color=TEXT, linewidth=1.8)
            axes.text(103, row, f"{100 * share:.1f} %", va="center")
        axes.set_xlim(0, 120)
        axes.set_xticks([0, 25, 50, 75, 100])
        _rows(axes, list(found))
        axes.set_xlabel("% of accepted chains", loc="left")
        return _svg(
            figure, "shares", "Share of the accepted chains that have each step, with the paper's share as a tick"
        )


def losses(train: Points, held_out: Mapping[str, Points]) -> str:
    """Lines: the training loss, and the held-out loss as a whole (`all`) and of each step."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(240)
        if train:
            axes.plot(*zip(*train, strict=True), color=MUTED, linewidth=1.2, marker="." if len(train) < 3 else "")
        for name, points in held_out.items():
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    color=TEXT if name == "all" else STEP.get(name, MUTED),
                    linewidth=2.2 if name == "all" else 1.5,
                    linestyle="-" if name in MARKERS else "--",
                    marker=MARKERS.get(name, "x") if len(points) <= 40 else "",
                    markersize=4,
                )
        axes.grid(axis="y", linewidth=0.7)
        axes.set_xlim(0, 1.04 * max(step for points in (train, *held_out.values()) for step, _ in points))
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        axes.set_title("loss a token", loc="left", fontsize=FONT)
        axes.set_xlabel("training step", loc="right")
        return _svg(figure, "loss", "Training loss and held-out loss over the training steps")


def tokens(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Stacked bars: mean tokens of an answer, one bar a mode, one segment a step."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(26 * len(rows) + 50)
        most = max((sum(segments.values()) for segments in rows.values()), default=0) or 1
        for row, segments in enumerate(rows.values()):
            left = 0.0
            for step, count in segments.items():
                if count:
                    colour = STEP.get(step, MUTED)
                    axes.barh(row, count, left=left, height=0.6, color=colour, edgecolor=PAGE, linewidth=0.8)
                    left += count
            axes.text(left + most / 60, row, f"{left:.1f}", va="center")
        axes.set_xlim(0, most * 1.15)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        _rows(axes, list(rows))
        axes.set_xlabel("mean tokens an answer", loc="left")
        return _svg(figure, "tokens", "Mean tokens of an answer in each mode, by step")


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
    return figure, figure.add_subplot()


def _rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), [label if len(label) <= 24 else f"{label[:23]}…" for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(axis="x", linewidth=0.7)


def _svg(figure: Figure, name: str, label: str) -> str:
    """Draw a figure as an SVG element that can stand in a page beside others and looks the same every time."""
    sink = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(sink, format="svg", transparent=True)
    drawn = sink.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'\bid="', f'id="{name}-', drawn)
    drawn = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', drawn)
    drawn = drawn.replace("url(#", f"url(#{name}-")
    drawn = re.sub(
        r"font: ([\d.]+)px [^;\"]*|font-family: [^;\"]*; ", lambda m: f"font-size: {m[1]}px" if m[1] else "", drawn
    )
    for placeholder, colour in CSS.items():
        drawn = drawn.replace(placeholder, colour)
    box = re.search(r'viewBox="[^"]*"', drawn)
    assert box is not None
    head = f'<svg class="plot" {box.group()} role="img" aria-label="{label}">'
    return re.sub(r"<svg[^>]*>", lambda _: head, drawn, count=1).strip()
