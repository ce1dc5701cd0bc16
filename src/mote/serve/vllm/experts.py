"""All experts of a linear layer of vLLM, added to what the layer computes, whatever its weights are stored as.

Projections that vLLM packs into one layer (q, k, v; gate, up) have experts of their own: their A stand below each
other in one product, their B are a product each. Tensor parallelism cuts A where the layer cuts its inputs and B where
it cuts its outputs. `mote.serve.vllm.merged` computes the same with fewer products where a batch's steps can
be looked at.
Shapes: T token, D model (in, out), E expert, R rank, P packed projection, S step.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

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


class Part(NamedTuple):
    """The experts of one projection that are this process's.

    Attributes:
        outputs: Where the projection's outputs are among those of the layer.
        first: A (E*R, in).
        second: B (out, E*R).
    """

    outputs: slice
    first: Tensor
    second: Tensor


class Gates:
    """The gates of the running batch, in a buffer that a compiled graph can read.

    Args:
        table: Gates of the question, of each step and of the base model's tokens (1 + S + 1, E*R).
        most: Most tokens of a batch.
    """

    def __init__(self, table: Tensor, most: int) -> None:
        self.table, self.buffer = table, table[:1].repeat(most, 1)

    def set(self, steps: Tensor) -> None:
        """Take the gates of a batch whose tokens are in these steps (T,)."""
        torch.index_select(self.table, 0, steps.long(), out=self.buffer[: len(steps)])


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


class OnTop(QuantizeMethodBase):
    """A layer's own method, with something on top of its outputs.

    Args:
        method: The layer's own.
    """

    def __init__(self, method: QuantizeMethodBase) -> None:
        self.method = method

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        """Never called: the layer has its weights."""
        self.method.create_weights(layer, *args, **kwargs)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """What the layer's own method does then."""
        self.method.process_weights_after_loading(layer)


class WithExperts(OnTop):
    """The experts on top; vLLM calls it before outputs of several processes are summed.

    Args:
        method: The layer's own.
        gates: Of the running batch.
    """

    def __init__(self, method: QuantizeMethodBase, gates: Gates) -> None:
        super().__init__(method)
        self.gates = gates

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Outputs (T, out) of inputs x (T, in)."""
        out: Tensor = self.method.apply(layer, x, bias)
        gates = self.gates.buffer[: x.shape[0]]
        hidden = layer.mote_A(x).view(x.shape[0], -1, gates.shape[1]) * gates[:, None]
        for place, (outputs, second) in enumerate(zip(layer.mote_outputs, layer.mote_B, strict=True)):
            out[:, outputs] += second(hidden[:, place].contiguous())
        return out


def add_experts(layer: LinearBase, pairs: Mapping[int, Pair], gates: Gates) -> None:
    """Put experts on a layer.

    Args:
        layer: A linear layer of vLLM.
        pairs: Experts by the position of their projection in the layer; the others get none.
        gates: Of the running batch.
    """
    parts = parts_of(layer, pairs, gates.buffer)
    layer.mote_A = Product(torch.cat([part.first for part in parts]))
    layer.mote_B = torch.nn.ModuleList(Product(part.second) for part in parts)
    layer.mote_outputs = [part.outputs for part in parts]
    layer.quant_method = WithExperts(layer.quant_method, gates)


def parts_of(layer: LinearBase, pairs: Mapping[int, Pair], like: Tensor) -> list[Part]:
    """The experts of a layer that are this process's, with dtype and device of another tensor."""
    by_row = isinstance(layer, RowParallelLinear)
    inputs = layer.input_size_per_partition if by_row else layer.input_size
    part = _part(layer.tp_rank, inputs) if by_row else slice(None)
    parts, begin = [], 0
    for place, width in enumerate(_widths(layer)):
        if place in pairs:
            first, second = pairs[place]
            own = second[_outputs(layer, place, width)]
            parts.append(Part(slice(begin, begin + width), first[:, part].to(like), own.to(like)))
        begin += width
    return parts


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
