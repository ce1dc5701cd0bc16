"""Matmul with a linear layer's weight, by whichever CPU library is faster on this processor.

PyTorch multiplies float32 matrices on a CPU by MKL, which falls back to slow kernels on processors other than Intel's:
on an AMD EPYC with AVX-512 they take 1.5 to 2.4 times as long as those of oneDNN, which PyTorch ships too
(docs/decisions/0034). On Intel's processors MKL is at least as fast, for a single row by a fifth.
`torch.backends.mkldnn.flags(enabled=False)` turns oneDNN off.
Shapes: N rows, D model (in, out).
"""

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from typing_extensions import override

from mote.core.machine import INTEL, cpu_vendor

Matmul = Callable[..., Tensor]  # (x, weight[, bias]) -> x weight^T + bias, as torch.nn.functional.linear


def fast_matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` by the faster library, without gradients.

    Args:
        x: (..., in).
        weight: (out, in), of any strides.
        bias: (out).

    Returns:
        (..., out).
    """
    if not _onednn_is_faster(x, weight):
        return linear(x, weight, bias)
    out_N: Tensor = torch.ops.mkldnn._linear_pointwise(x.reshape(-1, x.shape[-1]), weight, bias, "none", [], "")
    # As in PyTorch's own linear, autograd must not take the output for a view: callers write to it in place.
    return torch.ops.aten._unsafe_view(out_N, [*x.shape[:-1], out_N.shape[-1]])  # type: ignore[no-any-return]


def add_matmul(matmul: Matmul, out_N: Tensor, x_N: Tensor, weight: Tensor) -> Tensor:
    """Add `matmul(x, weight)` to `out` in place, without gradients, and return `out`; takes matrices (N, D) only."""
    if matmul is fast_matmul and _onednn_is_faster(x_N, weight):
        return out_N.add_(fast_matmul(x_N, weight))
    return out_N.addmm_(x_N, weight.t())


def _onednn_is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is faster for this matmul; measured in float32 on x86 CPUs of other vendors than Intel."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and ONEDNN_IS_FASTER
        and bool(torch.backends.mkldnn.enabled)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and x.numel() > 0
    )


HAS_ONEDNN: bool = (
    torch.backends.cpu.get_cpu_capability().startswith("AVX")
    and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # a private operator
)
ONEDNN_IS_FASTER: bool = HAS_ONEDNN and cpu_vendor() != INTEL


class FrozenLinear(nn.Linear):
    """A linear layer that uses `fast_matmul` while its weight and bias are frozen, and is `nn.Linear` otherwise."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        bias = self.bias
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        if trained or type(weight) is not nn.Parameter or not _onednn_is_faster(x, weight):
            return super().forward(x)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return fast_matmul(x, weight, bias)
        out: Tensor = _FrozenMatmul.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return out


class _FrozenMatmul(torch.autograd.Function):
    """`fast_matmul` with a gradient for x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in), weight (out, in), bias (out) -> (..., out)."""
        ctx.save_for_backward(weight)
        return fast_matmul(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """dx = dout W."""
        (weight,) = ctx.saved_tensors
        return fast_matmul(grad, weight.t()), None, None


def is_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer is PyTorch's own linear layer: not quantised, not a subclass."""
    return type(layer) in (nn.Linear, FrozenLinear)


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether weight and bias may be used without calling the layer: no hook or replaced `forward` would be missed."""
    return is_linear(layer) and "forward" not in vars(layer) and not (layer._forward_hooks or layer._forward_pre_hooks)


def matmul_of(layer: nn.Module) -> Matmul:
    """The matmul that a layer's forward uses."""
    return fast_matmul if type(layer) is FrozenLinear else linear


def bind(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """The layer's forward (..., in) -> (..., out) as one function, without gradients, with all lookups done ahead."""
    weight = layer.weight
    bias = layer.bias
    if matmul_of(layer) is fast_matmul and _onednn_is_faster(weight, weight):
        return lambda x: fast_matmul(x, weight, bias)
    if bias is not None:
        return lambda x: linear(x, weight, bias)
    transposed = weight.t()
    matmul = torch.matmul
    return lambda x: matmul(x, transposed)


def speed_up(model: nn.Module) -> None:
    """Let the linear layers of a model use `fast_matmul` while they are frozen; names, weights and memory stay.

    Layers on a GPU are left alone, where looking at them would take longer than `nn.Linear` itself. The others change
    class in place: a replaced module would lose its hooks and other references that the model's code holds.
    """
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.device.type == "cpu":
            module.__class__ = FrozenLinear


def lay_out_by_columns(model: nn.Module) -> None:
    """Store the weights (out, in) of a model's linear layers column by column, for decoding on a CPU.

    A single row's matmul is bound by reading the weights, and takes 0.73 of the time in this layout
    (docs/decisions/0034). Values, shapes, names and memory stay. Weights that another module shares, such as a head
    tied to the embedding, keep their layout: the embedding is read by rows. They are copied all the same: a
    memory-mapped checkpoint stays in memory, beside the new layout, as long as any weight still points into it.
    """
    users: dict[int, int] = {}
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            users[id(weight)] = users.get(id(weight), 0) + 1
    kept = {id(parameter): (parameter, parameter.data_ptr()) for parameter in model.parameters()}
    for module in model.modules():
        if not is_linear(module) or users[id(module.weight)] > 1:
            continue
        if module.weight.device.type == "cpu" and module.weight.dtype == torch.float32:  # others were not measured
            module.weight.data = module.weight.data.t().contiguous().t()
            kept.pop(id(module.weight), None)
    copies: dict[int, Tensor] = {}
    for parameter, address in kept.values():
        if parameter.device.type == "cpu" and parameter.dtype == torch.float32:
            if address not in copies:
                copies[address] = parameter.data.clone()
            parameter.data = copies[address]
