"""The product with a linear layer's weight, by the library that is fast at it on the CPU at hand.

PyTorch multiplies float32 matrices on a CPU by MKL, whose products have a slow form on processors that are not
Intel's: on an AMD EPYC with AVX-512 it takes 1.5 to 2.4 times as long as oneDNN, which is in PyTorch too
(docs/decisions/0034). On Intel's own MKL is at least as fast, by a fifth for a single row.
`torch.backends.mkldnn.flags(enabled=False)` turns oneDNN off.
Shapes: N rows, D model (in, out).
"""

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from mote.core.machine import INTEL, cpu_vendor

Product = Callable[..., Tensor]  # of x, weight and, where there is one, bias


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, without a gradient.

    Args:
        x: (..., in).
        weight: (out, in), of any strides.
        bias: (out).

    Returns:
        (..., out).
    """
    if not _is_faster(x, weight):
        return linear(x, weight, bias)
    out_N: Tensor = torch.ops.mkldnn._linear_pointwise(x.reshape(-1, x.shape[-1]), weight, bias, "none", [], "")
    # As in PyTorch's own: to autograd it is no view, which a caller could not write to.
    return torch.ops.aten._unsafe_view(out_N, [*x.shape[:-1], out_N.shape[-1]])  # type: ignore[no-any-return]


def add_product(multiply: Product, out_N: Tensor, x_N: Tensor, weight: Tensor) -> Tensor:
    """Add `multiply(x, weight)` to `out` in place, without a gradient, and return that; rows (N, D) alone."""
    if multiply is product and _is_faster(x_N, weight):
        return out_N.add_(product(x_N, weight))
    return out_N.addmm_(x_N, weight.t())


def _is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN computes the product of these, as far as was measured: in float32 on an x86 CPU not of Intel's."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and HERE
        and bool(torch.backends.mkldnn.enabled)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and x.numel() > 0
    )


HAS_ONEDNN: bool = (
    torch.backends.cpu.get_cpu_capability().startswith("AVX")
    and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # not of PyTorch's public interface
)
HERE: bool = HAS_ONEDNN and cpu_vendor() != INTEL


class FrozenLinear(nn.Linear):
    """A linear layer that is not trained, as `speed_up` makes them; where its weight or bias is, it is PyTorch's."""

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (..., out) of inputs x (..., in)."""
        weight, bias = self.weight, self.bias
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        if trained or type(weight) is not nn.Parameter or not _is_faster(x, weight):
            return super().forward(x)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return product(x, weight, bias)
        out: Tensor = _Frozen.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return out


class _Frozen(torch.autograd.Function):
    """`product` with a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """X (..., in), weight (out, in), bias (out) -> (..., out)."""
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """D x = d out W."""
        (weight,) = ctx.saved_tensors
        return product(grad, weight.t()), None, None


def is_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer is PyTorch's linear one: not quantised, not another class made of it."""
    return type(layer) in (nn.Linear, FrozenLinear)


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a linear layer's weight and bias may be used without a call of it: nobody watches or replaces that."""
    return is_linear(layer) and "forward" not in vars(layer) and not (layer._forward_hooks or layer._forward_pre_hooks)


def product_of(layer: nn.Module) -> Product:
    """What a layer multiplies by."""
    return product if type(layer) is FrozenLinear else linear


def bind(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """The product of a layer, (..., in) -> (..., out), without a gradient and with all that can be looked up before."""
    weight, bias = layer.weight, layer.bias
    if product_of(layer) is product and _is_faster(weight, weight):
        return lambda x: product(x, weight, bias)
    if bias is not None:
        return lambda x: linear(x, weight, bias)
    turned, multiply = weight.t(), torch.matmul
    return lambda x: multiply(x, turned)


def speed_up(model: nn.Module) -> None:
    """Let the linear layers of a model take `product`, in place; names, weights and memory stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FrozenLinear


def lay_out_by_columns(model: nn.Module) -> None:
    """Lay the weights (out, in) of a model's linear layers out column by column, where text is written on a CPU.

    One row's products are bound by reading the weights, and reading them so takes 0.73 of the time
    (docs/decisions/0034). Values, shapes, names and memory stay. Weights that another module shares, the head's tied to
    the embedding, are left alone: the embedding is read by rows.
    """
    users: dict[int, int] = {}
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            users[id(weight)] = users.get(id(weight), 0) + 1
    for module in model.modules():
        if not is_linear(module) or users[id(module.weight)] > 1:
            continue
        if module.weight.device.type == "cpu" and module.weight.dtype == torch.float32:  # others were not measured
            module.weight.data = module.weight.data.t().contiguous().t()
