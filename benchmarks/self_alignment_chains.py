"""Chains of the self-alignment recipes: a fixed sample to read by hand, and what the verdicts add up to.

    python benchmarks/self_alignment_chains.py strip CHAINS FILE          # without the texts that were turned down
    python benchmarks/self_alignment_chains.py draw CHAINS SAMPLE         # 40 accepted chains, seed 0, as text to read
    python benchmarks/self_alignment_chains.py count CHAINS VERDICTS OUT  # shares, acceptance, verdicts -> JSON

VERDICTS has one JSON object a line: `id`, `kind`, `tags` (`looks_harmful` for a benign question that only looks
harmful, `wrapped`), `steps` (step -> whether it makes sense) and `reason`, one neutral sentence. Its rows are exactly
those drawn, in their order.
"""

import argparse
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mote.core.files import write_atomic, write_json
from mote.core.machine import environment
from mote.core.records import ChainRow, read_rows, rewrite_rows

SEED, DRAWN = 0, 40
PAPER = {"analysis": 0.715, "guidance": 0.614, "response": 1.0}  # section 3.1
GOAL = {"sensible": 32, "looks_harmful_helped": 8}


def stripped(row: ChainRow) -> ChainRow:
    """The chain without text that its check or a quality rule turned down: such text may help with harm."""
    checks = tuple(
        check if check.safe and row.accepted else check.model_copy(update={"answer": ""}) for check in row.checks
    )
    steps = row.steps if row.accepted else tuple(step.model_copy(update={"text": ""}) for step in row.steps)
    return row.model_copy(update={"checks": checks, "steps": steps})


def draw(rows: Sequence[ChainRow], count: int = DRAWN) -> list[ChainRow]:
    """So many accepted chains, by default those that are read, whatever the order in which they were written."""
    accepted = sorted((row for row in rows if row.accepted), key=lambda row: row.id)
    return random.Random(SEED).sample(accepted, min(count, len(accepted)))


def as_page(rows: Sequence[ChainRow]) -> str:
    """The drawn chains as text."""
    parts = []
    for number, row in enumerate(rows, 1):
        turns = "\n".join(f"  {message.role}: {message.content}" for message in row.messages)
        steps = "\n".join(f"  [{step.name}] {step.text}" for step in row.steps)
        parts.append(f"--- {number}. {row.id} ({row.kind})\n{turns}\n{steps}\n")
    return "\n".join(parts)


def counted(rows: Sequence[ChainRow], verdicts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Acceptance and shares of all chains, and what the verdicts on the drawn ones add up to.

    Raises:
        SystemExit: The verdicts are not those of the drawn chains and their steps.
    """
    accepted, drawn = [row for row in rows if row.accepted], draw(rows)
    if [(v["id"], set(v["steps"])) for v in verdicts] != [(r.id, {s.name for s in r.steps}) for r in drawn]:
        raise SystemExit("the verdicts are not those of the drawn chains, in their order and with their steps")
    sensible = [all(verdict["steps"].values()) for verdict in verdicts]
    steps = Counter((name, ok) for verdict in verdicts for name, ok in verdict["steps"].items())
    depths = Counter(len(row.steps) for row in accepted)
    by_step = {name: {"sensible": steps[name, True], "read": steps[name, True] + steps[name, False]} for name in PAPER}
    return {
        "questions": len(rows),
        "accepted": len(accepted),
        "by_kind": {
            kind: {"questions": sum(r.kind == kind for r in rows), "accepted": sum(r.kind == kind for r in accepted)}
            for kind in ("harmful", "benign")
        },
        "why_not": dict(Counter(row.rejected or "unsafe to the end" for row in rows if not row.accepted).most_common()),
        "depths": {str(depth): depths[depth] for depth in sorted(depths)},
        "shares": {
            name: {"share": round(sum(any(s.name == name for s in r.steps) for r in accepted) / len(accepted), 3),
                   "paper": share}
            for name, share in PAPER.items()
        },
        "read": {
            "seed": SEED, "drawn": len(drawn), "sensible": sum(sensible),
            "looks_harmful_helped": sum(
                ok and "looks_harmful" in verdict["tags"] for ok, verdict in zip(sensible, verdicts, strict=True)
            ),
            "steps": by_step,
            "goal": GOAL,
        },
        "tokens": {
            "made": sum(row.tokens.made for row in rows), "read": sum(row.tokens.read or 0 for row in rows),
            "made_per_accepted": round(sum(row.tokens.made for row in rows) / len(accepted), 1),
        },
        "seconds": round(sum(row.seconds for row in rows), 1),
        "environment": environment(),
    }  # fmt: skip


def main() -> None:
    """Strip chains, draw a sample, or count verdicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["strip", "draw", "count"])
    parser.add_argument("chains", type=Path)
    parser.add_argument("file", type=Path, help="the chains or the sample to write, or the verdicts to read")
    parser.add_argument("out", type=Path, nargs="?", help="JSON file of `count`")
    given = parser.parse_args()
    rows = read_rows(given.chains, ChainRow)
    if given.do == "strip":
        rewrite_rows(given.file, [stripped(row) for row in sorted(rows, key=lambda row: row.id)])
        return
    if given.do == "draw":
        write_atomic(given.file, as_page(draw(rows)))
        return
    verdicts = [json.loads(line) for line in given.file.read_text(encoding="utf-8").splitlines()]
    result = counted(rows, verdicts)
    write_json(given.out, result)
    print(json.dumps(result["read"]))


if __name__ == "__main__":
    main()
