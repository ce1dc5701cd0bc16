"""Masked training against training on the seven data sets it replaces, and masked against causal attention.

The seven data sets of the paper's appendix B, for a chain (x, a, g, y): (x, y), (x, a), (x, a, y), (x, g), (x, g, y),
(x, a, g) and the full chain.
"""

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mote.experiments.bench.measurements import synchronize
from mote.experiments.bench.workload import STEPS
from mote.tokens.encode import IGNORED, Tokens
from mote.tokens.masks import Layout, MakeMask, skip_probabilities
from mote.tokens.packing import ChainDataset, collate
from mote.tokens.routing import QUESTION
from mote.train.loss import plain_head, tiled_losses, token_losses

UNSEEN = ("labels", "visibility", "segment_ids", "weights")  # batch entries that the model does not take
aten = torch.ops.aten


def seven(row: Tokens) -> list[Tokens]:
    """The rows of a chain in the seven data sets; fewer if it has no guidance or no analysis."""
    present = [step for step in range(1, len(STEPS) + 1) if step in row.steps]
    kept = [steps for n in range(1, len(present) + 1) for steps in itertools.combinations(present, n)]
    return [_cut(row, steps) for steps in kept]


def _cut(row: Tokens, steps: tuple[int, ...]) -> Tokens:
    """A chain cut to some of its steps; the end of turn belongs to the last step."""
    at = [index for index, step in enumerate(row.steps) if step == QUESTION or step in steps]
    return Tokens([row.ids[i] for i in at], [row.labels[i] for i in at], [row.steps[i] for i in at])


def step_occurrences(rows: Sequence[Tokens]) -> int:
    """Number of steps with a loss, over all rows."""
    return sum(len(set(row.steps) - {QUESTION}) for row in rows)


@dataclass
class Pass:
    """Forward, backward and an update on each batch: what is timed and whose FLOPs are counted.

    Attributes:
        model: With experts.
        batches: Output of `collate`.
        make_mask: Makes the masks; None for causal attention with consecutive positions.
    """

    model: Any
    batches: list[dict[str, Tensor]]
    make_mask: MakeMask | None

    def __post_init__(self) -> None:
        """Create the optimiser, the default of transformers' Trainer."""
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, fused=True)

    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of each token but the first (B, T-1); 0 without a label."""
        inputs = {name: value for name, value in batch.items() if name not in UNSEEN}
        if self.make_mask is None:
            del inputs["position_ids"]
        else:
            inputs["attention_mask"] = self.make_mask(Layout.of(batch))
        head = plain_head(self.model)
        if head is None:
            return token_losses(self.model(**inputs, use_cache=False).logits, batch["labels"])
        return tiled_losses(self.model, {**inputs, "use_cache": False}, batch["labels"], head)

    def __call__(self) -> float:
        """Run one pass over the batches; returns its seconds."""
        self.model.train()
        synchronize()
        began = time.perf_counter()
        for batch in self.batches:
            weights = (batch["weights"] * (batch["labels"] != IGNORED))[:, 1:]
            ((self.losses(batch) * weights).sum() / weights.sum()).backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        synchronize()
        return time.perf_counter() - began

    def flops(self) -> float:
        """FLOPs of one call; attention is counted densely, every query with every key of its row."""
        with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
            self()
        return float(counter.get_total_flops())


def batches(
    rows: Sequence[Tokens], skip_p: float, length: int | None, per_batch: int, pad_id: int, device: str, draws: int = 1
) -> list[dict[str, Tensor]]:
    """The batches of one epoch.

    Args:
        rows: Chains.
        skip_p: As in a recipe.
        length: Tokens of a packed row; None for one chain per row.
        per_batch: Rows per batch.
        pad_id: Padding id.
        device: Where the batches go.
        draws: Draws of each chain (`train.skip_views`).
    """
    data = ChainDataset(rows, skip_probabilities(skip_p, {}, STEPS), 0, length, draws)
    drawn = [data[i] for i in range(len(data))]
    parts = [drawn[i : i + per_batch] for i in range(0, len(drawn), per_batch)]
    return [on_device(collate(part, pad_id), device) for part in parts]


def on_device(batch: dict[str, Tensor], device: Any) -> dict[str, Tensor]:
    """The batch moved to a device."""
    return {name: value.to(device) for name, value in batch.items()}


def _addmm(own: Any, one: Any, other: Any, *_: Any, **__: Any) -> int:
    return int(2 * one[0] * one[1] * other[1])


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    rows, heads, length, size = query
    return int(2 * rows * heads * length * key[2] * (size + value[3]))


def _attention_back(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    rows, heads, length, size = query
    return int(2 * rows * heads * length * key[2] * (3 * size + 2 * value[3]))  # recomputed scores and four gradients


def _linear(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return int(2 * math.prod(x) * weight[0])


UNCOUNTED = {  # what PyTorch's counter misses: the experts' in-place matmuls, and SDPA on a CPU
    aten.addmm_: _addmm,
    torch.ops.mkldnn._linear_pointwise: _linear,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_back,
}
