"""`mote bench experts`: the project's performance targets, and the results as a table."""

from collections.abc import Mapping
from typing import Any

from mote.experiments.bench.timing import paired
from mote.experiments.bench.variants import CONTROL, FAST, PLAIN, REFERENCE

OURS = "mote-4x16"
GATED = "token-gated"
AT_MOST = {"training step": 1.0, "decoding one row": 1.0, "peak memory": 1.02}  # step experts over plain LoRA
PEFT_AT_MOST = {  # the same on a base as transformers loads it, in a user's own loops
    "PEFT training step": 1.0,
    "PEFT decoding in a step": 1.0,
    "PEFT decoding in a step, mean with first token": 1.0,
    "PEFT generate": 1.0,
}
AT_LEAST = {"training step": 1.8}  # token-gated over step experts


def expert_targets(measures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each measured target with its ratio; the median decides whether it is met."""
    found = []
    for name, measure in measures.items():
        rounds = {variant: row["rounds"] for variant, row in measure["variants"].items()}
        what = name.removesuffix(", compiled")
        for one, other, kind, limits in (
            (OURS, REFERENCE, "at_most", AT_MOST),
            (OURS, REFERENCE + FAST, "at_most", AT_MOST),
            (PLAIN, REFERENCE, "at_most", PEFT_AT_MOST),
            (GATED, OURS, "at_least", AT_LEAST),
            (GATED + FAST, OURS, "at_least", AT_LEAST),
        ):
            if what in limits and one in rounds and other in rounds:
                ratio = paired(rounds[one], rounds[other])
                limit = limits[what]
                met = ratio["median"] <= limit if kind == "at_most" else ratio["median"] >= limit
                found.append({"target": f"{name}: {one} over {other}", kind: limit, "ratio": ratio, "met": met})
    return found


def table(result: Mapping[str, Any]) -> str:
    """All measurements and targets as text."""
    lines = []
    for name, measure in result["measures"].items():
        lines += [
            f"{name} ({measure['unit']})",
            f"  {'':<20}{'median':>10}{'ratio':>8}  {'quartiles':<16}{'over base':>9}",
        ]
        for variant, row in measure["variants"].items():
            number = f"{row['median']:.4f}" if measure["unit"] == "s" else f"{row['median']:.1f}"
            quartiles = f"{row['ratio']['lower']:.3f} to {row['ratio']['upper']:.3f}" if len(row["rounds"]) > 1 else ""
            over = f"{row['over_base']['median'] - 1:+.1%}" if "over_base" in row else ""
            note = "  A/A control" if variant == CONTROL else ""
            ratio = row["ratio"]["median"]
            lines.append(f"  {variant:<20}{number:>10}{ratio:>8.3f}  {quartiles:<16}{over:>9}{note}".rstrip())
        lines.append("")
    lines += [f"not measured: {f['measure']} of {f['variant']} ({f['reason']})" for f in result["failures"]]
    for target in result["targets"]:
        limit = f"at most {target['at_most']:.2f}" if "at_most" in target else f"at least {target['at_least']:.2f}"
        verdict = "met" if target["met"] else "NOT MET"
        lines.append(f"{verdict:<8} {target['target']}: {target['ratio']['median']:.3f} ({limit})")
    return "\n".join(lines)
