"""The experts' output, `result + ((x A^T) * weights) B^T`: a plain form, and faster ones that equal it.

The plain form is the reference, and what a compiler gets. The fused form adds into the base layer's output, which it
can compute too, and saves only what its hand-derived gradients need. Decoding on a CPU has its own form
(`mote.tuner.cpu_decode`).
Shapes: N tokens of all rows, D model (in, out), E expert, R rank.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from mote.models.linear import Matmul, add_matmul
from mote.tuner.expert_weights import Route
from mote.tuner.step_runs import FusedByRun

Frozen = tuple[Tensor, Tensor | None]  # weight (out, in) and bias (out) of a base layer


def add_experts(
    x: Tensor,
    result: Tensor,
    lora_A: nn.Module,
    lora_B: nn.Module,
    route: Route,
    owns_result: bool,
    matmul: Matmul = linear,
) -> Tensor:
    """Add the experts' output to the base layer's.

    Args:
        x: Input of the experts (..., in).
        result: Output of the base layer (..., out); the experts compute in its dtype.
        lora_A: All experts' A as one linear layer, in -> E*R.
        lora_B: All experts' B as one linear layer, E*R -> out.
        route: Expert weights of the forward pass.
        owns_result: Whether `result` is no view and may be written to.
        matmul: The matmul to use.

    Returns:
        (..., out).
    """
    if route.idle:
        return result
    a = lora_A.weight
    b = lora_B.weight
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    expert_weights = _expert_weights(route, x, result)
    if not (is_whole(a, result.device) and is_whole(b, result.device)):
        # Sharded or offloaded weights are gathered when their module is called.
        delta: Tensor = lora_B(lora_A(x.to(a.dtype)) * expert_weights.to(a.dtype))
        return result + delta.to(result.dtype)
    if torch.compiler.is_compiling():  # a compiler fuses these by itself
        return plain(x, result, a, b, expert_weights)
    in_place = owns_result and result.is_contiguous()
    if route.runs and matmul is linear:
        return FusedByRun.apply(  # type: ignore[no-any-return, no-untyped-call]
            x, result, a, b, route.runs, route.columns, in_place
        )
    if not torch.is_grad_enabled():
        return _without_gradients(x, result, a, b, expert_weights, in_place, matmul)
    fused: Tensor = Fused.apply(x, result, a, b, expert_weights, in_place, matmul)  # type: ignore[no-untyped-call]
    return fused


def with_base(x: Tensor, frozen: Frozen, lora_A: nn.Module, lora_B: nn.Module, route: Route, matmul: Matmul) -> Tensor:
    """Output of a frozen base layer with its experts (..., out); one backward pass gives the gradient of x for both.

    Args:
        x: Input (..., in), in the dtype of the weights.
        frozen: Weight and bias of the base layer.
        lora_A: As in `add_experts`, its weight neither sharded nor offloaded.
        lora_B: As `lora_A`.
        route: Expert weights of the forward pass.
        matmul: The matmul to use.
    """
    expert_weights = _expert_weights(route, x, x)
    a = lora_A.weight
    b = lora_B.weight
    if route.runs and matmul is linear:
        return FusedByRun.apply(  # type: ignore[no-any-return, no-untyped-call]
            x, None, a, b, route.runs, route.columns, False, *frozen
        )
    out: Tensor = Fused.apply(x, None, a, b, expert_weights, False, matmul, *frozen)  # type: ignore[no-untyped-call]
    return out


def is_whole(weight: Any, device: torch.device) -> bool:
    """Whether a weight can be used as it is: neither sharded nor offloaded."""
    return type(weight) is nn.Parameter and weight.ndim == 2 and weight.device == device


def _expert_weights(route: Route, x: Tensor, result: Tensor) -> Tensor:
    """The route's weights in the shape that the layer sees (..., E*R); some blocks flatten rows and tokens."""
    weights = route.weights
    if weights.shape[:-1] != x.shape[:-1]:
        weights = weights.reshape(*x.shape[:-1], weights.shape[-1])
    return weights.to(result.device, result.dtype)


def plain(x: Tensor, result: Tensor, lora_A: Tensor, lora_B: Tensor, expert_weights: Tensor) -> Tensor:
    """`add_experts` in differentiable operations, the reference of the other forms; arguments as in `Fused`."""
    dtype = result.dtype
    return result + linear(linear(x.to(dtype), lora_A.to(dtype)) * expert_weights, lora_B.to(dtype))


def _without_gradients(
    x: Tensor,
    result: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    expert_weights: Tensor,
    in_place: bool,
    matmul: Matmul,
) -> Tensor:
    """`Fused` where no gradient is recorded; arguments as there.

    Calling an autograd function takes longer than the matmuls of a decoded token: on a GPU, which waits for its calls,
    that is the time of a token.
    """
    dtype = result.dtype
    if not x.dtype == lora_A.dtype == lora_B.dtype == dtype:
        x = x.to(dtype)
        lora_A = lora_A.to(dtype)
        lora_B = lora_B.to(dtype)
    hidden = matmul(x, lora_A).mul_(expert_weights)
    if not in_place:
        return result + matmul(hidden, lora_B)
    add_matmul(matmul, result.view(-1, result.shape[-1]), hidden.view(-1, hidden.shape[-1]), lora_B)
    return result


class Fused(torch.autograd.Function):
    """`plain` with hand-derived gradients for x, result, A and B.

    With a frozen base layer's weight and bias in place of `result`, it computes the base layer's output too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        result: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        expert_weights: Tensor,
        in_place: bool,
        matmul: Matmul = linear,
        base_weight: Tensor | None = None,
        base_bias: Tensor | None = None,
    ) -> Tensor:
        """Experts added to `result`, or to the base layer's output.

        Args:
            ctx: Autograd's context.
            x: (..., in).
            result: (..., out).
            lora_A: (E*R, in).
            lora_B: (out, E*R).
            expert_weights: (..., E*R).
            in_place: Whether to write to `result`.
            matmul: The matmul to use.
            base_weight: (out, in), in place of `result`.
            base_bias: (out).
        """
        if result is None:
            assert base_weight is not None
            result = matmul(x, base_weight, base_bias)
            in_place = True
        elif in_place:
            ctx.mark_dirty(result)
        dtype = result.dtype
        hidden_N = matmul(_rows(x).to(dtype), lora_A.to(dtype))
        result_N = _rows(result)
        weighted_N = hidden_N * _rows(expert_weights)
        b = lora_B.to(dtype)
        if in_place:
            add_matmul(matmul, result_N, weighted_N, b)
        else:
            result = torch.addmm(result_N, weighted_N, b.t()).view_as(result)
        ctx.save_for_backward(x, hidden_N, lora_A, lora_B, expert_weights, base_weight)
        ctx.matmul = matmul
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """dhidden = (dout B) * w; dA = dhidden^T x; dB = dout^T (hidden * w); dx = dhidden A + dout W.

        w are the expert weights, W the base layer's weight.
        """
        x, hidden_N, lora_A, lora_B, expert_weights, base_weight = ctx.saved_tensors
        wants_x, wants_result, wants_A, wants_B, *_ = ctx.needs_input_grad
        matmul = ctx.matmul
        dtype = grad.dtype
        grad_N = _rows(grad)
        weights_N = _rows(expert_weights)
        grad_hidden_N = matmul(grad_N, lora_B.to(dtype).t()).mul_(weights_N)
        grad_x = None
        if wants_x:
            a = lora_A.to(dtype)
            if base_weight is None:
                grad_x_N = matmul(grad_hidden_N, a.t())
            else:
                grad_x_N = add_matmul(matmul, matmul(grad_N, base_weight.t()), grad_hidden_N, a.t())
            grad_x = grad_x_N.view_as(x).to(x.dtype)
        grad_A = matmul(grad_hidden_N.t(), _rows(x).to(dtype).t()).to(lora_A.dtype) if wants_A else None
        grad_B = matmul((hidden_N * weights_N).t(), grad_N.t()).t().to(lora_B.dtype) if wants_B else None
        return grad_x, grad if wants_result else None, grad_A, grad_B, None, None, None, None, None


def _rows(x: Tensor) -> Tensor:
    """(..., D) as (N, D)."""
    return x.reshape(-1, x.shape[-1])
