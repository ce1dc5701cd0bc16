"""The product of the experts, `result + ((x A^T) * gate) B^T`: one plain form, and faster ones that equal it.

The plain form is the reference, and what a compiler gets. The fused form adds into the base layer's output, which it
computes as well where it may, and keeps only what its hand-derived gradients need. Text that is written token by token
has a way of its own (`mote.tuner.cpu_decode`).
Shapes: N tokens of all rows, D model (in, out), E expert, R rank, S step.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from mote.models.linear import Matmul, add_matmul
from mote.tuner.expert_weights import Columns, Route

Frozen = tuple[Tensor, Tensor | None]  # weight (out, in) and bias (out) of a base layer


def add_experts(
    x: Tensor, result: Tensor, first: nn.Module, second: nn.Module, route: Route, own: bool, matmul: Matmul = linear
) -> Tensor:
    """Add the experts' output to the base layer's.

    Args:
        x: Input of the experts (..., in).
        result: Output of the base layer (..., out); its dtype is the one to compute in.
        first: All experts' A as one linear layer, in -> E*R.
        second: All experts' B as one linear layer, E*R -> out.
        route: The gates of the running forward pass.
        own: Whether `result` is a tensor of its own that may be written to.
        matmul: What to matmul by.

    Returns:
        (..., out).
    """
    if route.idle:
        return result
    a, b = first.weight, second.weight
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    if not (is_whole(a, result.device) and is_whole(b, result.device)):
        # Sharded or offloaded weights come when their module is called.
        delta: Tensor = second(first(x.to(a.dtype)) * _gate(route, x, result).to(a.dtype))
        return result + delta.to(result.dtype)
    if torch.compiler.is_compiling():  # a compiler fuses these by itself
        return plain(x, result, a, b, _gate(route, x, result))
    fused: Tensor = Fused.apply(  # type: ignore[no-untyped-call]
        x, result, a, b, _gate(route, x, result), own and result.is_contiguous(), matmul
    )
    return fused


def with_base(x: Tensor, frozen: Frozen, first: nn.Module, second: nn.Module, route: Route, matmul: Matmul) -> Tensor:
    """Output of a frozen base layer and its experts (..., out); the gradient for x comes in one pass, too.

    Args:
        x: Input (..., in), of the weights' dtype.
        frozen: The base layer's.
        first: All experts' A, as in `add_experts`; its weight is whole.
        second: All experts' B, likewise.
        route: The gates of the running forward pass.
        matmul: What to matmul by.
    """
    whole: Tensor = Fused.apply(  # type: ignore[no-untyped-call]
        x, None, first.weight, second.weight, _gate(route, x, x), False, matmul, *frozen
    )
    return whole


def is_whole(weight: Any, device: torch.device) -> bool:
    """Whether a weight can be used as it is: not sharded, not offloaded."""
    return type(weight) is nn.Parameter and weight.ndim == 2 and weight.device == device


def _gate(route: Route, x: Tensor, result: Tensor) -> Tensor:
    """The gate as a layer needs it (..., E*R); some blocks flatten rows and tokens."""
    gate = (
        route.gate if route.gate.shape[:-1] == x.shape[:-1] else route.gate.reshape(*x.shape[:-1], route.gate.shape[-1])
    )
    return gate.to(result.device, result.dtype)


def plain(x: Tensor, result: Tensor, first: Tensor, second: Tensor, gate: Tensor) -> Tensor:
    """`add_experts` in differentiable operations, the reference of the other forms; arguments as in `Fused`."""
    dtype = result.dtype
    return result + linear(linear(x.to(dtype), first.to(dtype)) * gate, second.to(dtype))


class Fused(torch.autograd.Function):
    """`plain` on the weights themselves; gradients for x, result, A and B.

    With a frozen base layer's weight and bias in place of `result`, that is computed here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        result: Tensor | None,
        first: Tensor,
        second: Tensor,
        gate: Tensor,
        in_place: bool,
        matmul: Matmul = linear,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """X (..., in), result (..., out), A (E*R, in), B (out, E*R), gate (..., E*R), weight (out, in), bias (out)."""
        if result is None:
            assert weight is not None
            result, in_place = matmul(x, weight, bias), True
        elif in_place:
            ctx.mark_dirty(result)
        dtype = result.dtype
        hidden_N = matmul(_rows(x).to(dtype), first.to(dtype))
        result_N, gated_N, b = _rows(result), hidden_N * _rows(gate), second.to(dtype)
        if in_place:
            add_matmul(matmul, result_N, gated_N, b)
        else:
            result = torch.addmm(result_N, gated_N, b.t()).view_as(result)
        ctx.save_for_backward(x, hidden_N, first, second, gate, weight)
        ctx.matmul = matmul
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """D hidden = (d out B) * gate; dA = d hidden^T x; dB = d out^T (hidden * gate); dx = d hidden A + d out W."""
        x, hidden_N, first, second, gate, weight = ctx.saved_tensors
        wants_x, wants_result, wants_first, wants_second, *_ = ctx.needs_input_grad
        grad_N, gate_N, dtype, matmul = _rows(grad), _rows(gate), grad.dtype, ctx.matmul
        grad_hidden_N = matmul(grad_N, second.to(dtype).t()).mul_(gate_N)
        grad_x = None
        if wants_x:
            a = first.to(dtype)
            if weight is None:
                grad_x_N = matmul(grad_hidden_N, a.t())
            else:
                grad_x_N = add_matmul(matmul, matmul(grad_N, weight.t()), grad_hidden_N, a.t())
            grad_x = grad_x_N.view_as(x).to(x.dtype)
        grad_first = matmul(grad_hidden_N.t(), _rows(x).to(dtype).t()).to(first.dtype) if wants_first else None
        grad_second = matmul((hidden_N * gate_N).t(), grad_N.t()).t().to(second.dtype) if wants_second else None
        return grad_x, grad if wants_result else None, grad_first, grad_second, None, None, None, None, None


def fold(first: Tensor, second: Tensor, columns: Columns, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A step's own columns as a plain LoRA, with their weights multiplied into B.

    Args:
        first: A of all experts (E*R, in).
        second: B of all experts (out, E*R).
        columns: Those of the step.
        dtype: To compute in.

    Returns:
        A (2R, in) and B (out, 2R), by columns in memory, which is faster for few rows; R where there is no shared
        expert.
    """
    stretches, weights = columns
    a = torch.cat([first[stretch].to(dtype) for stretch in stretches])
    b = torch.cat([second[:, stretch].to(dtype).t() for stretch in stretches])
    return a, b.mul_(weights.to(dtype)[:, None]).t()


def _rows(x: Tensor) -> Tensor:
    """(..., D) as (N, D)."""
    return x.reshape(-1, x.shape[-1])
