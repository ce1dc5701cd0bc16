"""The report's plots: numbers in, inline SVG out.

matplotlib draws with placeholder colours, which are replaced by CSS variables of the page, so that one plot works in
light and dark mode.
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

HUES = ("analysis", "guidance", "response", "check")  # steps with their own colour
WIDTH, FONT = 400, 11.5  # in SVG units: on a phone a unit is a little under a pixel, on a desktop a little above
TEXT, LINE, MUTED, PAGE = "#010101", "#010102", "#010103", "#010104"
STEP = {"analysis": "#010201", "guidance": "#010202", "response": "#010203", "check": "#010204"}
SYSTEMS = tuple(f"#01030{number}" for number in range(1, 7))  # colours of systems, taken in turn
CSS = {
    TEXT: "currentColor",
    LINE: "var(--line)",
    MUTED: "var(--muted)",
    PAGE: "var(--page)",
    **{placeholder: f"var(--{step})" for step, placeholder in STEP.items()},
    **{placeholder: f"var(--system-{number})" for number, placeholder in enumerate(SYSTEMS, 1)},
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
LIGHT = {  # colours of a standalone SVG: the light ones of report.css.j2
    "currentColor": "#1b1f24",
    "var(--line)": "#d5d9de",
    "var(--muted)": "#59616b",
    "var(--page)": "#ffffff",
    "var(--analysis)": "#1f5fae",
    "var(--guidance)": "#8f5c00",
    "var(--response)": "#1b7138",
    "var(--check)": "#6b45b8",
    "var(--system-1)": "#59616b",
    "var(--system-2)": "#0b5cad",
    "var(--system-3)": "#b3261e",
    "var(--system-4)": "#1b7138",
    "var(--system-5)": "#8f5c00",
    "var(--system-6)": "#6b45b8",
}
OUTCOME = {"accepted": STEP["response"], "unsafe": MUTED, "rejected": LINE}
MARKERS = {"all": "o", "analysis": "s", "guidance": "^", "response": "D", "check": "v"}


def hue(step: str) -> str:
    """CSS name of a step's colour; steps of other schemes are neutral."""
    return step if step in HUES else "other"


def shares(found: Mapping[str, float], paper: Mapping[str, float]) -> str:
    """Bars: share of the chains that contain each step; a tick marks the paper's share."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(26 * len(found) + 50)
        for row, (step, share) in enumerate(found.items()):
            axes.barh(row, 100 * share, height=0.6, color=STEP.get(step, MUTED))
            if step in paper:
                axes.plot([100 * paper[step]] * 2, [row - 0.42, row + 0.42], color=PAGE, linewidth=5)
                axes.plot([100 * paper[step]] * 2, [row - 0.42, row + 0.42], color=TEXT, linewidth=1.8)
            axes.text(103, row, f"{100 * share:.1f} %", va="center")
        axes.set_xlim(0, 120)
        axes.set_xticks([0, 25, 50, 75, 100])
        label_rows(axes, list(found))
        axes.set_xlabel("% of accepted chains", loc="left")
        return as_svg(
            figure, "shares", "Share of the accepted chains that contain each step, with the paper's share as a tick"
        )


def losses(train: Points, held_out: Mapping[str, Points]) -> str:
    """Lines: training loss, and held-out loss overall (`all`) and per reasoning step."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(240)
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
        axes.set_title("loss per token", loc="left", fontsize=FONT)
        axes.set_xlabel("training step", loc="right")
        return as_svg(figure, "loss", "Training loss and held-out loss by training step")


def tokens(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Stacked bars: mean tokens per answer, one bar per mode, one segment per step."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(26 * len(rows) + 50)
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
        label_rows(axes, list(rows))
        axes.set_xlabel("mean tokens per answer", loc="left")
        return as_svg(figure, "tokens", "Mean tokens per answer in each mode, by step")


def outcomes(depths: Mapping[str, Mapping[str, int]]) -> str:
    """Stacked bars: accepted, unsafe and rejected chains of each depth."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(26 * len(depths) + 70)
        for row, counts in enumerate(depths.values()):
            left = 0
            for name, count in counts.items():
                colour = OUTCOME[name]
                axes.barh(row, count, left=left, height=0.6, color=colour, edgecolor=PAGE, linewidth=0.8, label=name)
                left += count
        label_rows(axes, list(depths))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("chains", loc="left")
        handles, labels = axes.get_legend_handles_labels()
        by_label = dict(zip(labels, handles, strict=True))
        figure.legend(by_label.values(), by_label.keys(), loc="outside upper left", ncols=len(by_label), frameon=False)
        return as_svg(figure, "outcomes", "Chains of each depth: accepted, unsafe, rejected")


def lengths(words: Mapping[str, tuple[float, float]]) -> str:
    """Bars: median words of each step's text, with a line to the 90th percentile."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(26 * len(words) + 50)
        for row, (step, (middle, most)) in enumerate(words.items()):
            axes.barh(row, middle, height=0.6, color=STEP.get(step, MUTED))
            axes.plot([middle, most], [row, row], color=TEXT, linewidth=1.2, marker="|", markevery=[1])
        label_rows(axes, list(words))
        axes.set_xlim(0, 1.05 * max(most for _, most in words.values()) or 1)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel("words: median and 90th percentile", loc="left")
        return as_svg(figure, "lengths", "Median and 90th percentile of the words of each step")


def spent(each: Mapping[str, float]) -> str:
    """Bars: prompt and generated tokens per accepted chain."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(26 * len(each) + 50)
        most = max(each.values())
        for row, count in enumerate(each.values()):
            axes.barh(row, count, height=0.6, color=MUTED)
            axes.text(count + most / 60, row, f"{count:.1f}", va="center")
        label_rows(axes, list(each))
        axes.set_xlim(0, most * 1.15)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel("tokens per accepted chain", loc="left")
        return as_svg(figure, "spent", "Prompt and generated tokens per accepted chain")


def standalone(drawn: Sequence[str]) -> str:
    """Stack plots vertically into a standalone SVG file, in light colours on white."""
    parts = []
    top = 0.0
    for svg in drawn:
        for variable, colour in LIGHT.items():
            svg = svg.replace(variable, colour)
        box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
        assert box is not None
        positioned = f'<svg x="0" y="{top:g}" width="{box[1]}" height="{box[2]}" '
        parts.append(svg.replace("<svg ", positioned, 1))
        top += float(box[2])
    size = f'width="{WIDTH}" height="{top:g}" viewBox="0 0 {WIDTH} {top:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#ffffff"/>', *parts, "</svg>"]) + "\n"


def new_figure(height: float) -> tuple[Figure, Axes]:
    """A figure of the common width."""
    figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
    return figure, figure.add_subplot()


def label_rows(axes: Axes, labels: Sequence[str]) -> None:
    """Label the rows of bars, the first one on top."""
    axes.set_yticks(range(len(labels)), [label if len(label) <= 32 else f"{label[:31]}…" for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(axis="x", linewidth=0.7)


def as_svg(figure: Figure, name: str, label: str) -> str:
    """Draw a figure as an SVG element with unique ids in its page; deterministic."""
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
