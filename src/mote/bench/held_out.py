"""Held-out loss after masked passes, and after as many over the seven data sets of the same chains."""

import random
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mote.bench.chains import Ground
from mote.bench.skipping import Pass, batches, seven
from mote.bench.timing import say
from mote.bench.trainers import with_experts
from mote.masks import document_mask
from mote.tokens import IGNORED, Tokens

LEARNING_RATE = 5e-4  # the quickstart's, and as there it falls linearly to 0
CHAINS = 2  # of an update: the quickstart's too


def compare_held_out(ground: Ground, seeds: Sequence[int], chains: int, epochs: int, skip_p: float) -> dict[str, Any]:
    """Train both arms from the same start on the same chains in the same order, once for each seed.

    An update of one arm is on masked chains, drawn anew in each epoch; of the other, on the seven data sets' rows of
    the same chains. Both are trained on `chains` chains, or on as many as leave a third of them. The loss is that of
    the text and end markers of held-out chains in all their seven forms: start markers are left out, since the arms are
    taught different choices of the next step (docs/decisions/0004). Chains have all three steps.

    Returns:
        Losses by arm and seed, before and after, of all forms and of the whole chains alone; the ratios of both.
    """
    rows = [row for row in ground.rows if {1, 2, 3} <= set(row.steps)]
    losses: dict[str, list[list[float]]] = {"before": [], "masked": [], "seven": []}
    count = min(chains, 2 * len(rows) // 3)
    for seed in seeds:
        order = random.Random(seed).sample(rows, len(rows))
        train, held = order[:count], order[count:]
        seen = []  # chains of each update
        for epoch in range(epochs):
            shuffled = random.Random(f"{seed} {epoch}").sample(train, count)
            seen += [shuffled[i : i + CHAINS] for i in range(0, count, CHAINS)]
        for arm in ("masked", "seven"):
            say(f"held-out loss: seed {seed}, {arm}")
            torch.manual_seed(seed)
            model = with_experts(ground, ground.config, False)
            if arm == "masked":
                losses["before"].append(_held_out(model, ground, held))
            _train(model, ground, seen, arm == "masked", skip_p, seed)
            losses[arm].append(_held_out(model, ground, held))
            say(f"held-out loss: seed {seed}, {arm}: {losses[arm][-1][0]}")
    pairs = list(zip(losses["masked"], losses["seven"], strict=True))
    ratios, of_whole = ([masked[kind] / built[kind] for masked, built in pairs] for kind in (0, 1))
    return {
        "seeds": list(seeds),
        "chains": {"trained on": count, "held out": len(rows) - count},
        "epochs": epochs,
        "updates": len(range(0, count, CHAINS)) * epochs,
        "learning_rate": LEARNING_RATE,
        "loss of all forms, of whole chains": losses,
        "ratios": [round(ratio, 4) for ratio in ratios],
        "median": round(statistics.median(ratios), 4),
        "ratios of whole chains": [round(ratio, 4) for ratio in of_whole],
        "median of whole chains": round(statistics.median(of_whole), 4),
    }


def _train(
    model: Any, ground: Ground, updates: Sequence[Sequence[Tokens]], masked: bool, skip_p: float, seed: int
) -> None:
    step = Pass(model, [], document_mask)
    [group] = step.optimizer.param_groups
    for index, rows in enumerate(updates):
        chains = [[row] if masked else seven(row) for row in rows]
        room = max(sum(len(form.ids) for form in forms) for forms in chains)
        step.batches = batches([form for forms in chains for form in forms], skip_p if masked else 0.0, room,
                               sum(map(len, chains)), ground.tokenizer.pad_token_id, ground.model.device,
                               seed * len(updates) + index)  # fmt: skip
        group["lr"] = LEARNING_RATE * (1 - index / len(updates))
        step()


@torch.no_grad()
def _held_out(model: Any, ground: Ground, rows: Sequence[Tokens]) -> list[float]:
    """Mean loss of text and end markers, over all forms of the rows and over the rows themselves."""
    model.eval()
    starts = torch.tensor([start for start, _ in ground.config.markers.values()], device=ground.model.device)
    totals = []
    for forms in ([form for row in rows for form in seven(row)], rows):
        drawn = batches(forms, 0.0, 1024, 1, ground.tokenizer.pad_token_id, ground.model.device)
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in drawn:
            batch.pop("question_experts")
            losses: Tensor = Pass(model, [], document_mask).losses(batch)
            labels = batch["labels"][:, 1:]
            counted = (labels != IGNORED) & ~torch.isin(labels, starts)
            sums += torch.stack([(losses * counted).sum(), counted.sum()]).double().cpu()
        totals.append(round(float(sums[0] / sums[1]), 5))
    return totals
