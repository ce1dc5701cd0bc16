"""Plots of an evaluation: safety against tokens (figure 6), and the three refusal classes."""

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from mote.evals.statistics import Estimate
from mote.report.evaluation import Point, mode_rank
from mote.report.plots import FONT, MUTED, PAGE, STEP, STYLE, SYSTEMS, TEXT, as_svg, label_rows, new_figure

MARKERS = {"base": "o", "direct": "D", "analysis": "^", "full": "s", "adaptive": "*", "adaptive+check": "X"}
CLASSES = {"full_compliance": STEP["analysis"], "partial_refusal": STEP["guidance"], "full_refusal": MUTED}


def curve(points: Sequence[Point], systems: Sequence[str], name: str, title: str, rated: bool) -> str:
    """A headline metric against tokens per answer, one colour per system and one marker per mode (figure 6).

    A line joins the budgets of a mode; points of a mode with an explicit budget are hollow and labelled with it.

    Args:
        points: Points of one metric.
        systems: All systems, in the order of their colours.
        name: Unique name of the plot within the page.
        title: Label of the vertical axis.
        rated: Whether the metric is a rating from 1 to 10; otherwise it is a share.
    """
    scale = 1 if rated else 100
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(270)
        for system in dict.fromkeys(point.system for point in points):
            colour = system_colour(system, systems)
            of_system = [point for point in points if point.system == system and point.score.value is not None]
            for mode in dict.fromkeys(_without_budget(point.mode) for point in of_system):
                of_mode = [point for point in of_system if _without_budget(point.mode) == mode]
                of_mode.sort(key=lambda point: point.tokens.value or 0)
                axes.plot(*_coordinates(of_mode, scale), color=colour, linewidth=1, zorder=2)
                for index, point in enumerate(of_mode):  # labels above and below in turn, so that neighbours stay apart
                    _draw_point(axes, point, scale, colour, below=index % 2 == 1)
        modes = sorted({_without_budget(point.mode) for point in points}, key=mode_rank)
        figure.legend(
            [Line2D([], [], color=TEXT, marker=_marker(mode), linestyle="", markersize=6) for mode in modes],
            modes,
            loc="outside lower left",
            ncols=5,
            frameon=False,
            handletextpad=0.1,
            columnspacing=1,
        )
        axes.grid(linewidth=0.7)
        axes.set_xlim(0, 1.08 * max(point.tokens.value or 0.0 for point in points) or 1)
        if not rated:
            axes.set_ylim(-4, 114)
            axes.set_yticks(range(0, 101, 20))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_title(title if rated else f"{title}, %", loc="left", fontsize=FONT)
        axes.set_xlabel("mean tokens per answer", loc="right")
        return as_svg(figure, name, f"{title} against mean tokens per answer, by system and mode")


def classes(rows: Mapping[str, Mapping[str, float]], name: str, title: str) -> str:
    """Stacked bars: shares of full compliance, partial and full refusal; one bar per system and mode."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(24 * len(rows) + 60)
        for row, shares in enumerate(rows.values()):
            left = 0.0
            for label, colour in CLASSES.items():
                width = 100 * shares.get(label, 0.0)
                axes.barh(row, width, left=left, height=0.66, color=colour, edgecolor=PAGE, linewidth=0.8)
                left += width
        axes.set_xlim(0, 100)
        label_rows(axes, list(rows))
        axes.set_title(title, loc="left", fontsize=FONT)
        axes.set_xlabel("% of answers", loc="left")
        return as_svg(figure, name, f"{title}: full compliance, partial refusal and full refusal by system and mode")


def system_colour(system: str, systems: Sequence[str]) -> str:
    """The colour of a system, by its index; colours repeat after the last one."""
    return SYSTEMS[systems.index(system) % len(SYSTEMS)]


def _draw_point(axes: Axes, point: Point, scale: float, colour: str, below: bool) -> None:
    (tokens,), (score,) = _coordinates([point], scale)
    low, high = _interval_ends(point.score)
    axes.plot([tokens, tokens], [scale * low, scale * high], color=colour, linewidth=0.9, alpha=0.55, zorder=2)
    mode, _, budget = point.mode.partition("@")
    size = 11 if mode == "adaptive" else 6.5
    fill = PAGE if budget else colour
    axes.plot(tokens, score, marker=_marker(mode), markersize=size, color=colour, markerfacecolor=fill, zorder=3)
    if budget:
        place = (5, -13 if below else 5)
        axes.annotate(budget, (tokens, score), place, textcoords="offset points", fontsize=FONT - 2, color=TEXT)


def _coordinates(points: Sequence[Point], scale: float) -> tuple[list[float], list[float]]:
    return [p.tokens.value or 0.0 for p in points], [scale * (p.score.value or 0.0) for p in points]


def _interval_ends(score: Estimate) -> tuple[float, float]:
    value = score.value or 0.0
    return (value if score.low is None else score.low), (value if score.high is None else score.high)


def _without_budget(mode: str) -> str:
    return mode.partition("@")[0]


def _marker(mode: str) -> str:
    return MARKERS.get(mode, "P")
