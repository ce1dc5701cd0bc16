"""The product of the experts, `result + ((x A^T) * gate) B^T`: plain, fused, and folded to the one step of a token.

The plain form is the reference, and what a compiler or a sharded weight gets. The fused form adds into the base layer's
output and keeps only what its hand-derived gradients need. The folded form is for writing token by token on a CPU,
where time goes to reading weights: it reads the columns of the token's own step alone.
Shapes: N tokens of all rows, D model (in, out), E expert, R rank.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


@dataclass
class Route:
    """What the layers of one adapter and rank need to know of the running forward pass.

    Attributes:
        gate: Weight of every expert's columns for every token (B, T, E*R), scaling included.
        step: The one step all tokens are in, where one token a row is written on a CPU; else None.
        weights: With `step`, its row of the gate table (E*R).
        folds: With `step`, the folded weights of the layers so far.
    """

    gate: Tensor
    step: int | None = None
    weights: Tensor | None = None
    folds: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)


def add_experts(x: Tensor, result: Tensor, first: nn.Module, second: nn.Module, route: Route, own: bool) -> Tensor:
    """Add the experts' output to the base layer's.

    Args:
        x: Input of the experts (..., in).
        result: Output of the base layer (..., out); its dtype is the one to compute in.
        first: All experts' A as one linear layer, in -> E*R.
        second: All experts' B as one linear layer, E*R -> out.
        route: The gates of the running forward pass.
        own: Whether `result` is a tensor of its own that may be written to.

    Returns:
        (..., out).
    """
    a, b, gate = first.weight, second.weight, route.gate
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    if (torch.compiler.is_compiling() or route.step is None) and gate.shape[:-1] != x.shape[:-1]:
        gate = gate.reshape(*x.shape[:-1], -1)  # blocks that flatten rows and tokens
    if gate.device != result.device or gate.dtype != result.dtype:
        gate = gate.to(result.device, result.dtype)
    if type(a) is not nn.Parameter or type(b) is not nn.Parameter or a.ndim != 2 or a.device != result.device:
        # Sharded or offloaded weights come when their module is called.
        delta: Tensor = second(first(x.to(a.dtype)) * gate.to(a.dtype))
        return result + delta.to(result.dtype)
    if torch.compiler.is_compiling():  # a compiler fuses these by itself
        return plain(x, result, a, b, gate)
    if route.step is not None:
        found = route.folds.get((route.step, id(a)))
        if found is None:
            assert route.weights is not None
            found = route.folds[route.step, id(a)] = fold(a, b, route.weights)
        return result.add_(linear(linear(x.to(result.dtype), found[0]), found[1]))
    added: Tensor = Fused.apply(x, result, a, b, gate, own and result.is_contiguous())  # type: ignore[no-untyped-call]
    return added


def plain(x: Tensor, result: Tensor, first: Tensor, second: Tensor, gate: Tensor) -> Tensor:
    """`add_experts` in differentiable operations, the reference of the other forms; arguments as in `Fused`."""
    dtype = result.dtype
    return result + linear(linear(x.to(dtype), first.to(dtype)) * gate, second.to(dtype))


class Fused(torch.autograd.Function):
    """`plain` on the weights themselves; gradients for x, result, A and B."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, result: Tensor, first: Tensor, second: Tensor, gate: Tensor, in_place: bool
    ) -> Tensor:
        """X (..., in), result (..., out), first A (E*R, in), second B (out, E*R), gate (..., E*R)."""
        dtype = result.dtype
        hidden_N = _rows(x).to(dtype) @ first.to(dtype).t()
        result_N = _rows(result)
        gated_N = hidden_N * _rows(gate)
        if in_place:
            torch.addmm(result_N, gated_N, second.to(dtype).t(), out=result_N)
            ctx.mark_dirty(result)
        else:
            result = torch.addmm(result_N, gated_N, second.to(dtype).t()).view_as(result)
        ctx.save_for_backward(x, hidden_N, first, second, gate)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """D hidden = (d out B) * gate; dA = d hidden^T x; dB = d out^T (hidden * gate); dx = d hidden A."""
        x, hidden_N, first, second, gate = ctx.saved_tensors
        wants_x, _, wants_first, wants_second, *_ = ctx.needs_input_grad
        grad_N, gate_N, dtype = _rows(grad), _rows(gate), grad.dtype
        grad_hidden_N = (grad_N @ second.to(dtype)).mul_(gate_N)
        grad_x = (grad_hidden_N @ first.to(dtype)).view_as(x).to(x.dtype) if wants_x else None
        grad_first = (grad_hidden_N.t() @ _rows(x).to(dtype)).to(first.dtype) if wants_first else None
        grad_second = (grad_N.t() @ (hidden_N * gate_N)).to(second.dtype) if wants_second else None
        return grad_x, grad, grad_first, grad_second, None, None


def fold(first: Tensor, second: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The columns that count for one step, as the A and B of a plain LoRA.

    Args:
        first: A (E*R, in).
        second: B (out, E*R).
        weights: The step's row of the gate table (E*R), scaling included, in the dtype to compute in.

    Returns:
        A (2R, in) and B (out, 2R) with the weights multiplied into B; R columns where there is no shared expert.
    """
    weights = weights.to(first.device)
    columns = weights.nonzero().squeeze(1)
    return first[columns].to(weights.dtype), second[:, columns].to(weights.dtype) * weights[columns]


def _rows(x: Tensor) -> Tensor:
    """(..., D) as (N, D)."""
    return x.reshape(-1, x.shape[-1])
