"""Results of ablations: the numbers of each variant and seed, and their means over seeds."""

import math
from collections.abc import Sequence
from statistics import mean, stdev

from pydantic import Field

from mote.chains.judge import JudgeCard
from mote.core.records import Frozen

# Student's t at 97.5 %, for 1 to 10 degrees of freedom; beyond, the normal distribution's is within 10 %.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_NORMAL = 1.96


class Judged(Frozen):
    """A judged number of one variant and seed.

    Attributes:
        judge: Name of the judge.
        low: Lower end of the 95 % interval over prompts.
        high: Its upper end.
        n: Prompts it is computed over.
        unparsed: Excluded prompts whose verdict could not be parsed.
        absent: Excluded prompts whose answer lacks the step to be judged.
    """

    judge: str
    low: float | None
    high: float | None
    n: int
    unparsed: int
    absent: int


class Measured(Frozen):
    """The results of one variant with one seed.

    Attributes:
        variant: Name of the variant.
        method: The training method; `prompted` or `chains` if nothing was trained.
        seed: The seed.
        mode: The mode in its row of the paper's table; empty if only chains were counted.
        trained_parameters: Number of trained parameters; 0 if nothing was trained.
        chains: Chains that were trained on, or counted.
        measures: Name -> number; names of numbers about answers end with the mode.
        judged: Details of the judged numbers, also of those without any parsed verdict.
        judges: Cards of the judges.
    """

    variant: str
    method: str
    seed: int
    mode: str = ""
    trained_parameters: int
    chains: int = 0
    measures: dict[str, float]
    judged: dict[str, Judged] = Field({})
    judges: tuple[JudgeCard, ...] = ()


class Interval(Frozen):
    """Mean over seeds with its 95 % interval.

    Attributes:
        mean: Mean over seeds.
        half: Half the width of the interval (Student's t); null for one seed.
        seeds: Number of seeds.
    """

    mean: float
    half: float | None
    seeds: int


class Line(Frozen):
    """One variant over all its seeds.

    Attributes:
        variant: Name of the variant.
        method: Its method, as in `Measured`.
        trained_parameters: As in `Measured`.
        measures: Name -> mean over seeds.
    """

    variant: str
    method: str
    trained_parameters: int
    measures: dict[str, Interval]


class Result(Frozen):
    """Everything that was measured so far.

    Attributes:
        name: Name of the comparison.
        seeds: The seeds of the recipe.
        rows: One per variant and seed.
        summary: One per variant.
    """

    name: str
    seeds: tuple[int, ...]
    rows: tuple[Measured, ...]
    summary: tuple[Line, ...]


def interval(values: Sequence[float]) -> Interval:
    """The mean with its 95 % interval, for normally distributed values."""
    count = len(values)
    if count == 1:
        return Interval(mean=values[0], half=None, seeds=1)
    t = _T[count - 2] if count - 2 < len(_T) else _NORMAL
    return Interval(mean=mean(values), half=t * stdev(values) / math.sqrt(count), seeds=count)


def summary_of(rows: Sequence[Measured]) -> tuple[Line, ...]:
    """One line per variant, in the order of the rows."""
    lines = []
    for variant in dict.fromkeys(row.variant for row in rows):
        own = [row for row in rows if row.variant == variant]
        names = dict.fromkeys(name for row in own for name in row.measures)
        measures = {name: interval([row.measures[name] for row in own if name in row.measures]) for name in names}
        lines.append(
            Line(
                variant=variant,
                method=own[0].method,
                trained_parameters=own[0].trained_parameters,
                measures=measures,
            )
        )
    return tuple(lines)


def markdown(result: Result) -> str:
    """The table: one row per variant, one column per measure, `mean ± half-width` of the 95 % interval over seeds."""
    names = list(dict.fromkeys(name for line in result.summary for name in line.measures))
    head = ["variant", "method", "trained parameters", *names]
    rows = [
        [line.variant, line.method, f"{line.trained_parameters:,}", *(_cell(line.measures.get(name)) for name in names)]
        for line in result.summary
    ]
    seeds = ", ".join(map(str, result.seeds))
    lines = [
        f"# {result.name}",
        "",
        f"Mean ± half of the 95 % interval over seeds {seeds}; losses are on held-out chains.",
        "",
    ]
    lines += [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def _cell(found: Interval | None) -> str:
    if found is None:
        return "-"
    digits = 1 if abs(found.mean) >= 10 else 3
    return f"{found.mean:.{digits}f}" + ("" if found.half is None else f" ± {found.half:.{digits}f}")
