"""Baseline implementations of step experts as people write them: masked adapters, and gathered segments.

Both compute the same as `mote.tuner`, with each expert stored as a separate adapter.
Shapes: B row, T token, N tokens of all rows, S step, E expert, R rank.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mote.tokens.routing import QUESTION
from mote.tuner import MoteConfig
from mote.tuner.expert_weights import expert_weight_table


class Segments:
    """Per-forward state shared by the layers of one model; a forward pre-hook sets it from `step_ids`."""

    def __init__(self, config: MoteConfig) -> None:
        self.table = expert_weight_table(config) * config.lora_alpha / config.r  # (1 + S, E)
        self.steps = len(config.experts)
        self.weights_E: tuple[Tensor, ...] = ()  # weight of each expert for each token, (B, T, 1)
        self.tokens: list[tuple[Tensor, list[int], list[float]]] = []  # per step: token indices, experts, their weights

    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook: pop `step_ids` (B, T) from the call."""
        steps: Tensor = kwargs.pop("step_ids")
        if model.training:  # one expert per row reads the question, drawn as in `mote.tuner.router`
            drawn = torch.randint(1, self.steps + 1, (len(steps), 1), device=steps.device)
            steps = torch.where(steps == QUESTION, drawn, steps)
        weight = next(model.parameters())
        self.weights_E = self.table.to(weight.device, weight.dtype)[steps][..., None].unbind(-2)
        flat = steps.flatten()
        self.tokens = []
        for step in sorted(set(flat.tolist())):
            experts = self.table[step].nonzero().flatten().tolist()
            weights = self.table[step, experts].tolist()
            self.tokens.append(((flat == step).nonzero().squeeze(1), experts, weights))
        return args, kwargs


class SplitLinear(nn.Module):
    """A frozen linear layer and its experts, each a separate pair of low-rank matrices."""

    def __init__(self, base_layer: nn.Linear, config: MoteConfig, segments: Segments) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.segments = segments
        weight = base_layer.weight
        experts = range(config.total_experts)
        rank = config.r
        self.A = nn.ParameterList(weight.new_empty(rank, base_layer.in_features) for _ in experts)
        self.B = nn.ParameterList(weight.new_zeros(base_layer.out_features, rank) for _ in experts)
        for a in self.A:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Base output plus the experts' output (B, T, out)."""
        raise NotImplementedError


class MaskedLinear(SplitLinear):
    """Applies every adapter to every token and multiplies by its mask."""

    def forward(self, x: Tensor) -> Tensor:
        """Base output plus the sum of mask * B(A(x)) over the adapters (B, T, out)."""
        result: Tensor = self.base_layer(x)
        for a, b, weight in zip(self.A, self.B, self.segments.weights_E, strict=True):
            result = result + linear(linear(x, a), b) * weight
        return result


class GatheredLinear(SplitLinear):
    """Gathers the tokens of each step, applies the concatenated pair of its experts, and scatters the result."""

    def forward(self, x: Tensor) -> Tensor:
        """Base output plus, for the tokens of a step, `[A_share; A_s]` and `[B_share, B_s]` (B, T, out)."""
        result: Tensor = self.base_layer(x)
        x_N = x.reshape(-1, x.shape[-1])
        result_N = result.reshape(-1, result.shape[-1])
        for tokens, experts, weights in self.segments.tokens:
            a = torch.cat([self.A[e] for e in experts])
            b = torch.cat([self.B[e] * w for e, w in zip(experts, weights, strict=True)], dim=1)
            result_N = result_N.index_add(0, tokens, linear(linear(x_N.index_select(0, tokens), a), b))
        return result_N.view_as(result)


def add_split_experts(model: nn.Module, config: MoteConfig, layer: type[SplitLinear]) -> nn.Module:
    """Add step experts to every linear layer except the head, in place, and freeze everything else."""
    model.requires_grad_(False)
    segments = Segments(config)
    model.register_forward_pre_hook(segments.before_forward, with_kwargs=True)
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer(module, config, segments))
    return model
