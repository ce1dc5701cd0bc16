"""Token-gated LoRA experts: on each linear layer a learned gate chooses two experts for each token.

This is what mixtures of LoRA experts do that know nothing of reasoning steps (LoRAMoE, MixLoRA, MoLA): a linear gate,
softmax, the two best experts with their weights scaled to sum to 1, and Switch's loss that keeps all experts in use.
Shapes: N tokens of all rows, D model (in, out), E expert, R rank.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import one_hot


@dataclass(frozen=True)
class TokenGatedConfig:
    """Configuration of token-gated experts; the LoRA fields mean what they mean in `LoraConfig`.

    Attributes:
        r: Rank of each expert.
        lora_alpha: Scale of each expert; an expert's output is multiplied by `lora_alpha / r`.
        lora_dropout: Dropout on the experts' input.
        experts: Number of experts of a layer.
        top_k: Experts that a token goes through.
        balance: Factor of the load-balance loss.
        target_modules: Endings of module names, or `all-linear` (every linear layer but the output head).
        dispatch: `gather` runs each expert on the tokens that chose it, as the published code does. `dense` runs all
            experts on all tokens in one pair of products and weighs the results; it gives the same numbers.

    Raises:
        ValueError: A value is out of range.
    """

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    experts: int = 4
    top_k: int = 2
    balance: float = 0.01
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    dispatch: Literal["gather", "dense"] = "gather"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r={self.r}: a rank is at least 1")
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k={self.top_k}: use 1 to {self.experts}, the number of experts")
        if self.dispatch not in ("gather", "dense"):
            raise ValueError(f"dispatch={self.dispatch!r}: use 'gather' or 'dense'")


class TokenGatedLinear(nn.Module):
    """A frozen linear layer with experts that a gate chooses per token.

    The experts of a layer lie in one parameter, so that neither dispatch copies weights.
    """

    def __init__(self, base_layer: nn.Linear, config: TokenGatedConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.config = config
        self.scaling = config.lora_alpha / config.r
        like: dict[str, Any] = {"device": base_layer.weight.device, "dtype": base_layer.weight.dtype}
        self.gate = nn.Linear(base_layer.in_features, config.experts, bias=False, **like)
        self.experts_A = nn.Parameter(torch.empty(config.experts, config.r, base_layer.in_features, **like))
        self.experts_B = nn.Parameter(torch.zeros(config.experts, config.r, base_layer.out_features, **like))
        for expert in self.experts_A.unbind():
            nn.init.kaiming_uniform_(expert.detach(), a=math.sqrt(5))
        self.dropout = nn.Dropout(config.lora_dropout)
        self.balance: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Base output plus the weighted output of the chosen experts (..., out)."""
        result: Tensor = self.base_layer(x)
        x_N = x.reshape(-1, x.shape[-1])
        probabilities_N = self.gate(x_N).softmax(dim=-1, dtype=torch.float32)
        weights_N, chosen_N = choose(probabilities_N, self.config.top_k)
        if self.training:
            self.balance = switch_loss(probabilities_N, chosen_N)
        x_N = self.dropout(x_N)
        weights_N = (weights_N * self.scaling).to(x.dtype)
        add = self._add_gathered if self.config.dispatch == "gather" else self._add_dense
        return add(x_N, result.reshape(-1, result.shape[-1]), weights_N, chosen_N).view_as(result)

    def _add_gathered(self, x_N: Tensor, result_N: Tensor, weights_N: Tensor, chosen_N: Tensor) -> Tensor:
        delta_N = torch.zeros_like(result_N)
        is_chosen_E = one_hot(chosen_N, self.config.experts).permute(2, 0, 1)
        for expert, (a, b) in enumerate(zip(self.experts_A.unbind(), self.experts_B.unbind(), strict=True)):
            token, place = torch.where(is_chosen_E[expert])
            out = x_N[token] @ a.t() @ b * weights_N[token, place, None]
            delta_N.index_add_(0, token, out.to(delta_N.dtype))
        return result_N + delta_N

    def _add_dense(self, x_N: Tensor, result_N: Tensor, weights_N: Tensor, chosen_N: Tensor) -> Tensor:
        gate_N = weights_N.new_zeros(len(x_N), self.config.experts).scatter(1, chosen_N, weights_N)
        hidden_N = x_N @ self.experts_A.flatten(0, 1).t() * gate_N.repeat_interleave(self.config.r, dim=1)
        return torch.addmm(result_N, hidden_N, self.experts_B.flatten(0, 1))


def choose(probabilities_N: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The experts of each token.

    Args:
        probabilities_N: The gate's (N, E).
        top_k: Experts a token goes through, K.

    Returns:
        Their weights (N, K), which sum to 1, and their numbers (N, K).
    """
    weights_N, chosen_N = probabilities_N.topk(top_k, dim=-1)
    return weights_N / weights_N.sum(dim=-1, keepdim=True), chosen_N


def switch_loss(probabilities_N: Tensor, chosen_N: Tensor) -> Tensor:
    """Switch's balance loss, E times the sum of f_e P_e over the experts: 1 where all are used evenly.

    f_e is the share of all choices that fell on expert e, P_e its mean probability.

    Args:
        probabilities_N: The gate's (N, E).
        chosen_N: Numbers of the chosen experts (N, K).
    """
    experts = probabilities_N.shape[-1]
    share_E = one_hot(chosen_N, experts).float().mean(dim=(0, 1))
    return experts * (share_E * probabilities_N.mean(dim=0)).sum()


def add_token_gated(model: nn.Module, config: TokenGatedConfig) -> nn.Module:
    """Put token-gated experts on a model in place, and freeze everything else.

    Args:
        model: A transformers model.
        config: Which layers, and what to put on them.

    Returns:
        The model.

    Raises:
        ValueError: `target_modules` names no linear layer of the model.
    """
    model.requires_grad_(False)
    get_head = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    targets = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and (config.target_modules == "all-linear" or name.endswith(tuple(f".{t}" for t in config.target_modules)))
    ]
    if not targets:
        raise ValueError(f"target_modules={config.target_modules}: names no linear layer of the model")
    for name, module in targets:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, TokenGatedLinear(module, config))
    return model


def gated_layers(model: nn.Module) -> Iterator[TokenGatedLinear]:
    """The layers with token-gated experts."""
    return (module for module in model.modules() if isinstance(module, TokenGatedLinear))


def balance_loss(model: nn.Module) -> Tensor:
    """The load-balance loss of the last forward pass, to be added to the model's own: the layers' mean times `balance`.

    Raises:
        RuntimeError: No forward pass was made in training mode since the last call.
    """
    layers = list(gated_layers(model))
    losses = [layer.balance for layer in layers if layer.balance is not None]
    if not losses:
        raise RuntimeError("token-gated: there is no balance loss yet; call the model in training mode first")
    for layer in layers:
        layer.balance = None
    return layers[0].config.balance * torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


def save_token_gated(model: nn.Module, path: Path) -> None:
    """Write the gates and experts, by their parameters' names, as one safetensors file."""
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}, path)


def load_token_gated(model: nn.Module, path: Path) -> None:
    """Read what `save_token_gated` wrote into a model that `add_token_gated` prepared in the same way.

    Raises:
        ValueError: The file is that of other layers.
    """
    state = load_file(path)
    expected = {name for name, p in model.named_parameters() if p.requires_grad}
    if set(state) != expected:
        raise ValueError(f"token-gated: {path.name} differs from the model in {sorted(expected ^ set(state))[:3]}")
    model.load_state_dict(state, strict=False)
