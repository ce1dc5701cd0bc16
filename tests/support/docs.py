"""The repository's pages and their code blocks."""

import re
from pathlib import Path

FENCE = re.compile(r"^(<!-- runs -->\n)?```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[tuple[bool, str]]:
    """Fenced blocks of a language, and whether they are marked to be run."""
    return [(bool(m[1]), m[3]) for m in FENCE.finditer(page.read_text(encoding="utf-8")) if m[2] == language]
