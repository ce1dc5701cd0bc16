"""Step experts on vLLM's linear layers, for any weight format (quantised ones included).

vLLM packs projections (q, k, v; gate, up) into one layer. Each packed projection has its own experts: their `lora_A`
are stacked into one matmul, their `lora_B` take one matmul each. Under tensor parallelism `lora_A` is sharded like the
layer's inputs and `lora_B` like its outputs. `mote.serve.vllm.merged` computes the same with fewer matmuls on a CPU.
Shapes: T token, E expert, R rank, P packed projection, S step; in and out are a layer's features.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override
from vllm.model_executor.layers.linear import (
    LinearBase,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

Pair = tuple[Tensor, Tensor]  # lora_A (E*R, in) and lora_B (out, E*R)


class Part(NamedTuple):
    """This process's shard of the experts of one packed projection.

    Attributes:
        outputs: The projection's outputs within those of the layer.
        lora_A: (E*R, in).
        lora_B: (out, E*R).
    """

    outputs: slice
    lora_A: Tensor
    lora_B: Tensor


class ExpertWeights:
    """Expert weights of the running batch's tokens, in a buffer that a compiled graph can read.

    Args:
        table: Expert weights of the question, of each step and of base-model requests (1 + S + 1, E*R).
        max_tokens: Maximum number of tokens of a batch.
    """

    def __init__(self, table: Tensor, max_tokens: int) -> None:
        self.table = table
        self.buffer = table[:1].repeat(max_tokens, 1)

    def set(self, steps: Tensor) -> None:
        """Look up the weights of a batch with these step ids (T,)."""
        torch.index_select(self.table, 0, steps.long(), out=self.buffer[: len(steps)])


class SmallLinear(torch.nn.Module):
    """A matmul with a small matrix through vLLM's own kernel for this platform.

    Args:
        weight: (out, in).
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight.contiguous(), requires_grad=False)
        self.method = UnquantizedLinearMethod()
        self.method.process_weights_after_loading(self)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (T, out) of inputs x (T, in)."""
        out: Tensor = self.method.apply(self, x)
        return out


class WrappedMethod(QuantizeMethodBase):
    """Wraps a layer's `quant_method`, to add to its outputs.

    Args:
        method: The layer's original method.
    """

    def __init__(self, method: QuantizeMethodBase) -> None:
        self.method = method

    @override
    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        self.method.create_weights(layer, *args, **kwargs)

    @override
    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.method.process_weights_after_loading(layer)


class ExpertMethod(WrappedMethod):
    """Adds the experts' outputs; vLLM calls it before the tensor-parallel all-reduce.

    Args:
        method: The layer's original method.
        weights: Expert weights of the running batch.
    """

    def __init__(self, method: QuantizeMethodBase, weights: ExpertWeights) -> None:
        super().__init__(method)
        self.weights = weights

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Outputs (T, out) of inputs x (T, in)."""
        out: Tensor = self.method.apply(layer, x, bias)
        weights = self.weights.buffer[: x.shape[0]]
        hidden = layer.mote_A(x).view(x.shape[0], -1, weights.shape[1]) * weights[:, None]  # (T, P, E*R)
        for index, (outputs, lora_B) in enumerate(zip(layer.mote_outputs, layer.mote_B, strict=True)):
            out[:, outputs] += lora_B(hidden[:, index].contiguous())
        return out


def add_experts(layer: LinearBase, pairs: Mapping[int, Pair], weights: ExpertWeights) -> None:
    """Add experts to a layer.

    Args:
        layer: A linear layer of vLLM.
        pairs: Experts by the index of their projection in the layer; projections not named get none.
        weights: Expert weights of the running batch.
    """
    parts = shards(layer, pairs, weights.buffer)
    layer.mote_A = SmallLinear(torch.cat([part.lora_A for part in parts]))
    layer.mote_B = torch.nn.ModuleList(SmallLinear(part.lora_B) for part in parts)
    layer.mote_outputs = [part.outputs for part in parts]
    layer.quant_method = ExpertMethod(layer.quant_method, weights)


def shards(layer: LinearBase, pairs: Mapping[int, Pair], like: Tensor) -> list[Part]:
    """This process's shards of a layer's experts, in the dtype and on the device of `like`."""
    row_parallel = isinstance(layer, RowParallelLinear)
    width_in = layer.input_size_per_partition if row_parallel else layer.input_size
    inputs = _shard(layer.tp_rank, width_in) if row_parallel else slice(None)
    parts = []
    begin = 0
    for index, width in enumerate(_output_widths(layer)):
        if index in pairs:
            lora_A, lora_B = pairs[index]
            own_B = lora_B[_own_outputs(layer, index, width)]
            parts.append(Part(slice(begin, begin + width), lora_A[:, inputs].to(like), own_B.to(like)))
        begin += width
    return parts


def _shard(rank: int, size: int) -> slice:
    return slice(rank * size, (rank + 1) * size)


def _output_widths(layer: Any) -> list[int]:
    """Number of outputs of each packed projection in this process."""
    return list(getattr(layer, "output_partition_sizes", None) or [layer.output_size])


def _own_outputs(layer: Any, index: int, width: int) -> slice:
    """This process's outputs of a packed projection."""
    if isinstance(layer, RowParallelLinear) or layer.tp_size == 1:
        return slice(None)
    if isinstance(layer, QKVParallelLinear) and index > 0:
        return _shard(layer.tp_rank // layer.num_kv_head_replicas, width)
    return _shard(layer.tp_rank, width)
