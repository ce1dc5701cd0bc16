"""Collects a run's results: trained parameters, held-out losses, cost, answer lengths, refusals, judged numbers."""

import json
from pathlib import Path
from statistics import mean

from mote.chains.judge import COMPLIANCE
from mote.chains.stats import chain_stats
from mote.core.recipe import Recipe
from mote.core.records import Answer, ChainRow, iter_rows, read_rows
from mote.core.scheme import BASE
from mote.evals.judges.rule import classify, find_signs
from mote.evals.results import Summary
from mote.experiments.ablations.ablation_recipe import Variant
from mote.experiments.ablations.ablation_results import Judged, Measured

TOKENS = "tokens of training"
SECONDS = "seconds of training"
SELF_BLEU = "Self-BLEU"


def measured(variant: Variant, recipe: Recipe, folder: Path, chains: Path | None, summary: Summary | None) -> Measured:
    """All results of a variant with one seed.

    Args:
        variant: The variant.
        recipe: Its recipe.
        folder: Its run folder.
        chains: The chains it was trained on or, without training, whose statistics it reports.
        summary: The judged numbers, if there are tasks.
    """
    measures: dict[str, float] = {}
    trained = 0
    if variant.kind == "chains" and chains:
        measures |= _of_chains(chains)
    elif variant.kind == "trained":
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        trained = metrics[0]["trained_parameters"]
        measures |= _losses(metrics, recipe)
        measures |= {name: sum(row.get(key, 0) for row in metrics) for name, key in _COST.items()}
        measures |= _of_answers(folder / "answers")
    judged = _judged(summary) if summary else {}
    numbers = {f"{n.metric} {n.mode}": n.estimate.value for n in summary.numbers if not n.group} if summary else {}
    measures |= {name: value for name, value in numbers.items() if value is not None}
    if summary:
        measures |= {f"tokens {cost.mode}": cost.total for cost in summary.costs}
    return Measured(
        variant=variant.name,
        method=variant.method if variant.kind == "trained" else variant.kind,
        seed=recipe.seed,
        mode={"trained": recipe.answer.modes[0], "prompted": BASE, "chains": ""}[variant.kind],
        trained_parameters=trained,
        chains=sum(row.accepted for row in iter_rows(chains, ChainRow)) if chains else 0,
        measures=measures,
        judged=judged,
        judges=tuple(summary.judges) if summary else (),
    )


_COST = {TOKENS: "tokens", SECONDS: "seconds"}  # -> the key in lines of metrics.jsonl


def _losses(metrics: list[dict[str, float]], recipe: Recipe) -> dict[str, float]:
    """The held-out losses of the final weights: the best checkpoint's with early stopping, else the last."""
    held_out = [row for row in metrics if "eval_loss" in row]
    keeps_best = recipe.train.early_stopping_patience or (recipe.train.model_extra or {}).get("load_best_model_at_end")
    kept = min(held_out, key=lambda row: row["eval_loss"]) if keeps_best else held_out[-1] if held_out else {}
    losses = {key: value for key, value in kept.items() if key.startswith("eval_loss")}
    return {f"loss {key.removeprefix('eval_loss').lstrip('_') or 'all'}": value for key, value in losses.items()}


def _of_answers(folder: Path) -> dict[str, float]:
    """Lengths and refusal rates of answers without a judge."""
    measures = {}
    for path in sorted(folder.glob("*.jsonl")):
        answers = read_rows(path, Answer)
        mode = answers[0].mode
        measures[f"tokens {mode}"] = mean(answer.tokens.total for answer in answers)
        for kind in ("harmful", "benign"):
            of_kind = [answer for answer in answers if answer.kind == kind]
            if of_kind:
                measures[f"refused {kind} {mode}"] = mean(_declines(answer) for answer in of_kind)
    return measures


def _of_chains(chains: Path) -> dict[str, float]:
    """Share of the accepted chains with each step, and Self-BLEU of each step and of full chains."""
    measures = {}
    for text in chain_stats(chains).texts:
        measures[f"share {text.name}"] = text.share
        if text.self_bleu is not None:
            measures[f"{SELF_BLEU} {text.name}"] = text.self_bleu
    return measures


def _judged(summary: Summary) -> dict[str, Judged]:
    return {
        f"{number.metric} {number.mode}": Judged(
            judge=number.judge,
            low=number.estimate.low,
            high=number.estimate.high,
            n=number.estimate.n,
            unparsed=number.unparsed,
            absent=number.absent,
        )
        for number in summary.numbers
        if not number.group
    }


def _declines(answer: Answer) -> bool:
    """Whether an answer refuses fully or partially, by the offline rule (docs/decisions/0022)."""
    return classify(find_signs(answer.text, answer.answer)) != COMPLIANCE
