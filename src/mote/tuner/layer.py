"""An adapted linear layer: all experts side by side in one pair of matrices.

`A = [A_share; A_1; ...; A_n]`, `delta = ((x A^T) * weights) B^T`, where `weights` holds each expert's weight for the
token's step: one pair of matmuls for any number of experts, no gather and no loop (docs/decisions/0003).
Shapes: B row, T token, D model (in, out), E expert, R rank.
"""

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mote.models.linear import is_linear, is_plain, matmul_of
from mote.tuner.config import MoteConfig
from mote.tuner.experts import Frozen, add_experts, is_whole, with_base
from mote.tuner.router import Router


class MoteLinear(nn.Module, BaseTunerLayer):
    """A linear layer with step experts; the base layer is a black box, so it may be quantised.

    PEFT finds the layers of a second adapter by the word Linear in this class name.
    """

    adapter_layer_names = ("mote_A", "mote_B")
    other_param_names = ("mote_dropout", "ranks")

    base_layer: nn.Module
    mote_A: nn.ModuleDict
    mote_B: nn.ModuleDict
    mote_dropout: nn.ModuleDict

    def __init__(self, base_layer: nn.Module, router: Router) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.router = router
        router.layer = self
        self.in_features, self.out_features = linear_shape(base_layer)
        self.mote_A = nn.ModuleDict()
        self.mote_B = nn.ModuleDict()
        self.mote_dropout = nn.ModuleDict()
        self.ranks: dict[str, int] = {}
        # With a bias, and from other layers, the output may be a view, where writing in place gives wrong gradients.
        self.owns_output = is_linear(base_layer) and base_layer.bias is None
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, config: MoteConfig, rank: int, inference_mode: bool = False) -> None:
        """Add the experts of an adapter: A of shape (E*R, in), B of shape (out, E*R)."""
        width = config.total_experts * rank
        self.ranks[adapter_name] = rank
        lora_A = nn.Linear(self.in_features, width, bias=False)
        lora_B = nn.Linear(width, self.out_features, bias=False)
        self.mote_A[adapter_name] = lora_A
        self.mote_B[adapter_name] = lora_B
        if config.lora_dropout:
            self.mote_dropout[adapter_name] = nn.Dropout(config.lora_dropout)
        if config.init_weights == "gaussian":
            nn.init.normal_(lora_A.weight, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(lora_A.weight, a=math.sqrt(5))  # fan-in only, so as for each expert alone
        if config.init_weights:
            nn.init.zeros_(lora_B.weight)
        self._move_adapter_to_device_of_base_layer(adapter_name)  # type: ignore[operator]
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)  # type: ignore[operator]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base output plus the step experts' output (B, T, out)."""
        if self._disable_adapters:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        decode = self.router.decode_step()
        if decode is not None and (out := decode.forward(self, x)) is not None:  # the same, faster for a few tokens
            return out
        matmul = matmul_of(self.base_layer)
        names = [name for name in self.active_adapters if name in self.ranks]  # type: ignore[union-attr]
        if len(names) == 1 and (frozen := self._frozen(x, names[0])) is not None:
            name = names[0]
            route = self.router.route(name, self.ranks[name])
            return with_base(x, frozen, self.mote_A[name], self.mote_B[name], route, matmul)
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for name in names:
            dropped = self.mote_dropout[name](x) if self.training and name in self.mote_dropout else x
            route = self.router.route(name, self.ranks[name])
            lora_A = self.mote_A[name]
            lora_B = self.mote_B[name]
            result = add_experts(dropped, result, lora_A, lora_B, route, self.owns_output, matmul)
        return result

    def _frozen(self, x: Tensor, name: str) -> Frozen | None:
        """The base layer's weight and bias, if one fused function may compute its output and the experts'."""
        layer = self.base_layer
        if not x.requires_grad or not is_plain(layer) or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        if torch.is_autocast_enabled(x.device.type) or (self.training and name in self.mote_dropout):
            return None
        used = (layer.weight, self.mote_A[name].weight, self.mote_B[name].weight)
        trained = any(parameter.requires_grad for parameter in layer.parameters())
        if trained or layer.weight.dtype != x.dtype or not all(is_whole(part, x.device) for part in used):
            return None
        return layer.weight, layer.bias

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: experts depend on the token and cannot be merged into one weight.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "mote: experts are chosen per token, so they cannot be merged into the base weights; one step alone can: "
            "`mote export` writes it as a plain LoRA or merged"
        )

    def unmerge(self) -> None:
        """Do nothing, since nothing is ever merged."""

    def __repr__(self) -> str:
        return "mote." + super().__repr__()


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """Input and output features of a linear layer, which may be quantised or GPT-2's transposed `Conv1D`.

    Raises:
        ValueError: It is not a linear layer.
    """
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    raise ValueError(f"mote: {type(layer).__name__} cannot hold step experts; choose linear layers in target_modules")
