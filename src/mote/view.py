"""Chains -> one HTML page to read them by filter, which loads nothing from anywhere.

The rows stand in the page as data and are shown a few at a time, so that tens of thousands stay usable.
"""

from pathlib import Path
from typing import Any

from mote.errors import UserError
from mote.files import write_atomic
from mote.records import ChainRow, iter_rows
from mote.reporting import pages
from mote.stats import chains_file


def write_page(path: Path, out: Path) -> None:
    """Write the page of a file of chains, or of the one in a run folder.

    Raises:
        UserError: There are no chains, or one row is damaged.
        MoteError: The disk refused the page.
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
    """What the page shows of a chain; the script knows these names."""
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
