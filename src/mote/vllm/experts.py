"""All experts of a linear layer of vLLM, added to what the layer computes, whatever its weights are stored as.

Projections that vLLM packs into one layer (q, k, v; gate, up) have experts of their own: their A stand below each
other in one product, their B are a product each. Tensor parallelism cuts A where the layer cuts its inputs and B where
it cuts its outputs. Shapes: T token, D model (in, out), E expert, R rank, P packed projection.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import (
    LinearBase,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

Pair = tuple[Tensor, Tensor]  # A (E*R, in) and B (out, E*R)


class Product(torch.nn.Module):
    """A product with a small matrix, computed as vLLM computes those of its own layers on this machine.

    Args:
        weight: The matrix (out, in).
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


class WithExperts(QuantizeMethodBase):
    """A layer's own method, and the experts on top; vLLM calls it before outputs of several processes are summed.

    Args:
        method: The layer's own.
        gates: The router's buffer (most tokens, E*R), whose first rows are the gates of the running batch.
    """

    def __init__(self, method: QuantizeMethodBase, gates: Tensor) -> None:
        self.method, self.gates = method, gates

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        """Never called: the layer has its weights."""
        self.method.create_weights(layer, *args, **kwargs)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """What the layer's own method does then."""
        self.method.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Outputs (T, out) of inputs x (T, in)."""
        out: Tensor = self.method.apply(layer, x, bias)
        gates = self.gates[: x.shape[0]]
        hidden = layer.mote_A(x).view(x.shape[0], -1, gates.shape[1]) * gates[:, None]
        for place, (outputs, second) in enumerate(zip(layer.mote_outputs, layer.mote_B, strict=True)):
            out[:, outputs] += second(hidden[:, place].contiguous())
        return out


def add_experts(layer: LinearBase, pairs: Mapping[int, Pair], gates: Tensor) -> None:
    """Put experts on a layer.

    Args:
        layer: A linear layer of vLLM.
        pairs: Experts by the position of their projection in the layer; the others get none.
        gates: The router's buffer.
    """
    by_row = isinstance(layer, RowParallelLinear)
    inputs = layer.input_size_per_partition if by_row else layer.input_size
    part = _part(layer.tp_rank, inputs) if by_row else slice(None)
    firsts, seconds, outputs, begin = [], [], [], 0
    for place, width in enumerate(_widths(layer)):
        if place in pairs:
            first, second = pairs[place]
            firsts.append(first[:, part])
            seconds.append(Product(second[_outputs(layer, place, width)].to(gates)))
            outputs.append(slice(begin, begin + width))
        begin += width
    layer.mote_A, layer.mote_B = Product(torch.cat(firsts).to(gates)), torch.nn.ModuleList(seconds)
    layer.mote_outputs = outputs
    layer.quant_method = WithExperts(layer.quant_method, gates)


def _part(rank: int, size: int) -> slice:
    return slice(rank * size, (rank + 1) * size)


def _widths(layer: Any) -> list[int]:
    """Outputs of each packed projection in this process."""
    return list(getattr(layer, "output_partition_sizes", None) or [layer.output_size])


def _outputs(layer: Any, place: int, width: int) -> slice:
    """Which outputs of a projection are this process's."""
    if isinstance(layer, RowParallelLinear) or layer.tp_size == 1:
        return slice(None)
    if isinstance(layer, QKVParallelLinear) and place > 0:
        return _part(layer.tp_rank // layer.num_kv_head_replicas, width)
    return _part(layer.tp_rank, width)
