"""A file of chains -> one self-contained HTML page to browse and filter them, and plots of their statistics.

The rows are embedded as data and rendered one page at a time, so tens of thousands of chains stay usable.
"""

from pathlib import Path
from typing import Any

from mote.chains.stats import OUTCOMES, PAPER_SHARES, WHOLE, ChainStats, chains_file
from mote.core.errors import UserError
from mote.core.files import write_atomic
from mote.core.records import ChainRow, iter_rows
from mote.report import pages


def write_page(path: Path, out: Path) -> None:
    """Write the page of a chains file or of the one in a run folder.

    Raises:
        UserError: The file is missing, empty or damaged.
        MoteError: The page cannot be written.
    """
    file = chains_file(path)
    rows = [_compact(row) for row in iter_rows(file, ChainRow)]
    if not rows:
        raise UserError(f"chains: {file} holds no chains; make some with `mote chains`")
    page = pages.render(
        "chains.html.j2",
        styles=("report.css.j2", "browse.css.j2", "chains.css.j2"),
        scripts=("browse.js.j2", "chains.js.j2"),
        name=f"{file.parent.resolve().name}/{file.name}",
        total=len(rows),
        rows=rows,
    )
    write_atomic(out, page)


def _compact(row: ChainRow) -> dict[str, Any]:
    """The fields of a chain that the page shows; `chains.js.j2` uses these names."""
    return {
        "id": row.id,
        "kind": row.kind,
        "source": row.source,
        "turns": [[message.role, message.content] for message in row.messages],
        "steps": [[step.name, step.text] for step in row.steps],
        "verdict": row.rejected or ("accepted" if row.safe else "unsafe"),
        "checks": [[check.depth, check.safe, check.score, check.answer] for check in row.checks],
        "model": row.model,
        "tokens": [row.tokens.made, row.tokens.kept, row.tokens.read],
        "seconds": row.seconds,
    }


def plots_of(stats: ChainStats) -> list[str]:
    """SVG plots: step shares beside the paper's, outcomes by depth, text lengths, and tokens per accepted chain."""
    from mote.report import plots

    depths = {" > ".join(row.steps): {name: getattr(row, name) for name in OUTCOMES} for row in stats.depths}
    drawn = [plots.outcomes(depths)]
    if stats.texts:
        steps = [text for text in stats.texts if text.name != WHOLE]
        drawn.insert(0, plots.shares({text.name: text.share for text in steps}, PAPER_SHARES))
        drawn.append(plots.lengths({text.name: (text.words.median, text.words.p90) for text in stats.texts}))
    each = {"prompt": stats.cost.read_each, "generated": stats.cost.tokens_each}
    if recorded := {name: count for name, count in each.items() if count}:
        drawn.append(plots.spent(recorded))
    return drawn
