"""Token-gated LoRA experts: on each linear layer a learned gate chooses two experts for each token.

Mixtures of LoRA experts without reasoning steps work so (LoRAMoE, MixLoRA, MoLA): a linear gate, softmax, the two best
experts with their weights normalised to sum to 1, and Switch's load-balance loss. MoELoRA adds a contrastive loss.
Shapes: N tokens of all rows, D model (in, out), E expert, R rank.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

from mote.tuner.expert_weights import Route
from mote.tuner.layer import linear_shape
from mote.tuner.router import Router
from mote.tuner.token_gated.config import TokenGatedConfig

_CONTRASTED = 64  # tokens per layer in the contrastive loss, whose cost grows with their square


class TokenGatedLinear(nn.Module, BaseTunerLayer):
    """A frozen linear layer with experts that a gate chooses per token.

    All experts of a layer share one parameter, so that neither dispatch copies weights.
    """

    adapter_layer_names = ("token_gated_gate", "token_gated_A", "token_gated_B")
    other_param_names = ("configs",)

    def __init__(self, base_layer: nn.Module, router: Router | None = None) -> None:
        super().__init__()
        self.router = router
        if router is not None:
            router.layer = self
        self.base_layer = base_layer
        self.in_features, self.out_features = linear_shape(base_layer)
        self.configs: dict[str, TokenGatedConfig] = {}
        self.token_gated_gate = nn.ParameterDict()
        self.token_gated_A = nn.ParameterDict()
        self.token_gated_B = nn.ParameterDict()
        self.loss: Tensor | None = None
        self.use_E: Tensor | None = None
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, config: TokenGatedConfig, inference_mode: bool = False) -> None:
        """Add an adapter: its gate (E, in), A (E, R, in) and B (E, R, out)."""
        experts = config.gated_experts
        rank = config.r
        self.configs[adapter_name] = config
        gate = torch.empty(experts, self.in_features)
        lora_A = torch.empty(experts, rank, self.in_features)
        lora_B = torch.zeros(experts, rank, self.out_features)
        nn.init.kaiming_uniform_(gate, a=math.sqrt(5))
        for expert in lora_A.unbind():
            nn.init.kaiming_uniform_(expert, a=math.sqrt(5))
        if not config.init_weights:
            nn.init.normal_(lora_B)
        self.token_gated_gate[adapter_name] = nn.Parameter(gate)
        self.token_gated_A[adapter_name] = nn.Parameter(lora_A)
        self.token_gated_B[adapter_name] = nn.Parameter(lora_B)
        self._move_adapter_to_device_of_base_layer(adapter_name)  # type: ignore[operator]
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)  # type: ignore[operator]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base output plus the weighted output of the chosen experts (..., out).

        In training mode it sets `loss`, this layer's part of the gate loss, and `use_E`, the share of all routing
        choices that each expert got.
        """
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self._disable_adapters:
            return result
        for name in self.active_adapters:  # type: ignore[union-attr]
            if name in self.configs:
                result = self._add(name, x, result)
        return result

    def _add(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        config = self.configs[name]
        x_N = x.reshape(-1, x.shape[-1]).to(result.dtype)
        result_N = result.reshape(-1, result.shape[-1])
        gate, lora_A, lora_B = (
            part[name].to(result.dtype) for part in (self.token_gated_gate, self.token_gated_A, self.token_gated_B)
        )
        probabilities_N = (x_N @ gate.t()).softmax(dim=-1, dtype=torch.float32)
        weights_N, chosen_N = choose(probabilities_N, config.top_k)
        if self.training:
            self.loss = config.balance * switch_loss(probabilities_N, chosen_N)
            self.use_E = one_hot(chosen_N, config.gated_experts).float().mean(dim=(0, 1))
            if config.contrast:
                self.loss = self.loss + config.contrast * self._contrast(x_N, lora_A, lora_B, chosen_N, config)
            x_N = nn.functional.dropout(x_N, config.lora_dropout)
        weights_N = (weights_N * config.scaling(config.r)).to(result.dtype)
        if (route := self._route(name)) is not None:  # in continuous batching some sequences are the base model's
            weights_N = weights_N * route.weights.reshape(len(weights_N), -1).any(1, keepdim=True)
        add = _add_gathered if config.dispatch == "gather" else _add_dense
        return add(x_N, result_N, lora_A, lora_B, weights_N, chosen_N).view_as(result)

    def _route(self, name: str) -> Route | None:
        return None if self.router is None else self.router.known_route(name, self.configs[name].r)

    def _contrast(
        self, x_N: Tensor, lora_A: Tensor, lora_B: Tensor, chosen_N: Tensor, config: TokenGatedConfig
    ) -> Tensor:
        """`contrastive_loss` of tokens spread evenly over the batch."""
        some = torch.linspace(0, len(x_N) - 1, min(_CONTRASTED, len(x_N)), device=x_N.device).long()
        hidden = torch.einsum("nd,erd->ner", x_N[some], lora_A)
        outputs = torch.einsum("ner,ero->neo", hidden, lora_B) * config.scaling(config.r)
        chosen = chosen_N[some]
        own = outputs.gather(1, chosen[..., None].expand(-1, -1, outputs.shape[-1]))
        return contrastive_loss(own.flatten(0, 1), chosen.flatten(), config.temperature)


def _add_gathered(
    x_N: Tensor, result_N: Tensor, lora_A: Tensor, lora_B: Tensor, weights_N: Tensor, chosen_N: Tensor
) -> Tensor:
    """Run each expert on the tokens routed to it."""
    delta_N = torch.zeros_like(result_N)
    is_chosen_E = one_hot(chosen_N, len(lora_A)).permute(2, 0, 1)
    for expert, (a, b) in enumerate(zip(lora_A.unbind(), lora_B.unbind(), strict=True)):
        token, rank = torch.where(is_chosen_E[expert])
        out = x_N[token] @ a.t() @ b * weights_N[token, rank, None]
        delta_N.index_add_(0, token, out.to(delta_N.dtype))
    return result_N + delta_N


def _add_dense(
    x_N: Tensor, result_N: Tensor, lora_A: Tensor, lora_B: Tensor, weights_N: Tensor, chosen_N: Tensor
) -> Tensor:
    """Run all experts on all tokens and weight their outputs."""
    gate_N = weights_N.new_zeros(len(x_N), len(lora_A)).scatter(1, chosen_N, weights_N)
    hidden_N = x_N @ lora_A.flatten(0, 1).t() * gate_N.repeat_interleave(lora_A.shape[1], dim=1)
    return torch.addmm(result_N, hidden_N, lora_B.flatten(0, 1))


def choose(probabilities_N: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The best experts of each token.

    Args:
        probabilities_N: Gate probabilities (N, E).
        top_k: Number of experts per token.

    Returns:
        Their weights (N, top_k), normalised to sum to 1, and their indices (N, top_k).
    """
    weights_N, chosen_N = probabilities_N.topk(top_k, dim=-1)
    return weights_N / weights_N.sum(dim=-1, keepdim=True), chosen_N


def switch_loss(probabilities_N: Tensor, chosen_N: Tensor) -> Tensor:
    """Switch's load-balance loss, E times the sum of f_e P_e over the experts; 1 if all are used evenly.

    f_e is the share of all routing choices that expert e got, P_e its mean probability.

    Args:
        probabilities_N: Gate probabilities (N, E).
        chosen_N: Indices of the chosen experts (N, top_k).
    """
    experts = probabilities_N.shape[-1]
    share_E = one_hot(chosen_N, experts).float().mean(dim=(0, 1))
    return experts * (share_E * probabilities_N.mean(dim=0)).sum()


def contrastive_loss(outputs: Tensor, experts: Tensor, temperature: float) -> Tensor:
    """MoELoRA's loss: outputs of one expert should be similar, those of different experts not (docs/decisions/0025).

    The mean over outputs i of -log(sum_j exp(s_ij / t) / sum_k exp(s_ik / t)), where j runs over the other outputs of
    i's expert, k over all other outputs, and s is the cosine. Outputs of norm below 1 are not normalised, since a
    cosine's gradient is unbounded near 0, where every expert starts.

    Args:
        outputs: Outputs of single experts, one a row (N, out).
        experts: Expert index of each (N).
        temperature: t.

    Returns:
        The loss; 0 if no expert has two outputs.
    """
    vectors = normalize(outputs.float(), dim=-1, eps=1.0)
    itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    scores = (vectors @ vectors.t() / temperature).masked_fill(itself, float("-inf"))
    same = (experts[:, None] == experts) & ~itself
    counts = same.any(dim=1)
    alike = scores.masked_fill(~same, float("-inf"))[counts].logsumexp(dim=1)
    losses = scores[counts].logsumexp(dim=1) - alike
    return losses.mean() if len(losses) else scores.new_zeros(())


def gated_layers(model: nn.Module) -> Iterator[TokenGatedLinear]:
    """The layers with token-gated experts."""
    return (module for module in model.modules() if isinstance(module, TokenGatedLinear))


def gate_loss(model: nn.Module) -> Tensor:
    """The gate loss of the last forward pass: the mean over the layers.

    Raises:
        RuntimeError: There was no forward pass in training mode since the last call.
    """
    layers = list(gated_layers(model))
    losses = [layer.loss for layer in layers if layer.loss is not None]
    if not losses:
        raise RuntimeError("token-gated: there is no loss of the gates yet; call the model in training mode first")
    for layer in layers:
        layer.loss = None
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()
