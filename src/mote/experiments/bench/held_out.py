"""Held-out loss after training on masked chains, and after as many updates on the seven data sets of these chains."""

import random
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mote.experiments.bench.skipping import Pass, batches, on_device, seven
from mote.experiments.bench.timing import say
from mote.experiments.bench.trainers import with_experts
from mote.experiments.bench.workload import STEPS, Workload
from mote.tokens.encode import IGNORED, Tokens
from mote.tokens.masks import document_mask, masks_for, skip_probabilities
from mote.tokens.packing import ChainDataset, collate

LEARNING_RATE = 5e-4  # the quickstart's, with its linear decay to 0
CHAINS = 2  # per update, as in the quickstart
DRAWS = {  # skip_p and skip_views of each masked arm
    "skip_p 0.2": (0.2, 1),
    "skip_p 0.5": (0.5, 1),
    "skip_p 0.5, two draws": (0.5, 2),
}


def compare_held_out(workload: Workload, seeds: Sequence[int], chains: int, epochs: int) -> dict[str, Any]:
    """Train all arms from the same initialisation on the same chains in the same order, once per seed.

    A masked arm trains on masked chains, drawn again each epoch; the reference arm on the seven data sets' rows of the
    same chains. At most two thirds of the chains are trained on. The loss covers text and end markers of the held-out
    chains in all seven forms; start markers are excluded, because the arms learn different distributions of the next
    step (docs/decisions/0004). Only chains with all three steps are used.

    Args:
        workload: Model and chains.
        seeds: One comparison each.
        chains: Chains to train on, at most.
        epochs: Epochs of each arm.

    Returns:
        Losses by arm and seed, before and after training, over all forms and over full chains alone; both ratios of
        each masked arm.
    """
    rows = [row for row in workload.rows if {1, 2, 3} <= set(row.steps)]
    arms: dict[str, tuple[float, int] | None] = {**DRAWS, "seven": None}
    losses: dict[str, list[list[float]]] = {name: [] for name in ("before", *arms)}
    count = min(chains, 2 * len(rows) // 3)
    for seed in seeds:
        order = random.Random(seed).sample(rows, len(rows))
        train = order[:count]
        held = order[count:]
        shuffled = [random.Random(f"{seed} {epoch}").sample(train, count) for epoch in range(epochs)]
        for arm, draws in arms.items():
            say(f"held-out loss: seed {seed}, {arm}")
            torch.manual_seed(seed)
            model = with_experts(workload, workload.config, False)
            if len(losses["before"]) == len(losses["seven"]):
                losses["before"].append(_held_out(model, workload, held))
            _train(model, workload, shuffled, draws, seed)
            losses[arm].append(_held_out(model, workload, held))
            say(f"held-out loss: seed {seed}, {arm}: {losses[arm][-1][0]}")
    return {
        "seeds": list(seeds),
        "chains": {"trained on": count, "held out": len(rows) - count},
        "epochs": epochs,
        "updates": len(range(0, count, CHAINS)) * epochs,
        "learning_rate": LEARNING_RATE,
        "loss of all forms, of whole chains": losses,
        "draws": {name: _ratios(losses[name], losses["seven"]) for name in DRAWS},
    }


def _ratios(masked: list[list[float]], reference: list[list[float]]) -> dict[str, Any]:
    pairs = list(zip(masked, reference, strict=True))
    ratios = [one[0] / other[0] for one, other in pairs]
    of_whole = [one[1] / other[1] for one, other in pairs]
    return {
        "ratios": [round(ratio, 4) for ratio in ratios],
        "median": round(statistics.median(ratios), 4),
        "ratios of whole chains": [round(ratio, 4) for ratio in of_whole],
        "median of whole chains": round(statistics.median(of_whole), 4),
    }


def _train(
    model: Any, workload: Workload, epochs: Sequence[Sequence[Tokens]], draws: tuple[float, int] | None, seed: int
) -> None:
    """Train on the chains of each epoch in order: masked with these draws, or in all their forms."""
    forms = {id(chain): [chain] if draws else seven(chain) for chain in epochs[0]}
    skip_p, number = draws or (0.0, 1)
    indices = {}
    rows: list[Tokens] = []
    for chain, own in forms.items():
        indices[chain] = range(len(rows), len(rows) + len(own))
        rows += own
    data = ChainDataset(rows, skip_probabilities(skip_p, {}, STEPS), seed, draws=number)
    step = Pass(model, [], masks_for(model.config, document_mask))
    [group] = step.optimizer.param_groups
    updates = [
        (epoch, chains[i : i + CHAINS]) for epoch, chains in enumerate(epochs) for i in range(0, len(chains), CHAINS)
    ]
    for update, (epoch, chains) in enumerate(updates):
        data.set_epoch(epoch)
        drawn = [[data[index][0] for index in indices[id(chain)]] for chain in chains]
        step.batches = [on_device(collate(drawn, workload.tokenizer.pad_token_id), workload.model.device)]
        group["lr"] = LEARNING_RATE * (1 - update / len(updates))
        step()


@torch.no_grad()
def _held_out(model: Any, workload: Workload, rows: Sequence[Tokens]) -> list[float]:
    """Mean loss over text and end markers: of all forms of the chains, and of the full chains."""
    model.eval()
    starts = torch.tensor([start for start, _ in workload.config.markers.values()], device=workload.model.device)
    totals = []
    for forms in ([form for row in rows for form in seven(row)], rows):
        drawn = batches(forms, 0.0, 1024, 1, workload.tokenizer.pad_token_id, workload.model.device)
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in drawn:
            batch.pop("question_experts")
            losses: Tensor = Pass(model, [], masks_for(model.config, document_mask)).losses(batch)
            labels = batch["labels"][:, 1:]
            counted = (labels != IGNORED) & ~torch.isin(labels, starts)
            sums += torch.stack([(losses * counted).sum(), counted.sum()]).double().cpu()
        totals.append(round(float(sums[0] / sums[1]), 5))
    return totals
