"""The product of the experts, `result + ((x A^T) * gate) B^T`: one plain form, and faster ones that equal it.

The plain form is the reference, and what a compiler gets. The fused form adds into the base layer's output and keeps
only what its hand-derived gradients need. On a CPU, where time goes with the number of products, tokens of one step
that stand together are multiplied with the columns of their own experts alone (segmented). Text that is written token
by token has a way of its own (`mote.tuner.writing`).
Shapes: N tokens of all rows, D model (in, out), E expert, R rank, S step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

Segment = tuple[int, int, int]  # from this token of all rows to before that one, in this step
Columns = tuple[tuple[slice, ...], Tensor]  # stretches of columns that count for a step, and their weights (2R)
Fold = tuple[Tensor, Tensor]  # a step's own A (2R, in) and B (out, 2R)


@dataclass
class Route:
    """What the layers of one adapter and rank need to know of the running forward pass.

    Attributes:
        gate: Weight of every expert's columns for every token (B, T, E*R), scaling included.
        columns: The columns that count, for each step from the question on.
        segments: Stretches of tokens in one step, where it pays to use them; without any, no token has a step.
    """

    gate: Tensor
    columns: Sequence[Columns] = ()
    segments: tuple[Segment, ...] | None = None


def add_experts(
    x: Tensor,
    result: Tensor,
    first: nn.Module,
    second: nn.Module,
    route: Route,
    own: bool,
    weight: Tensor | None = None,
) -> Tensor:
    """Add the experts' output to the base layer's.

    Args:
        x: Input of the experts (..., in).
        result: Output of the base layer (..., out); its dtype is the one to compute in.
        first: All experts' A as one linear layer, in -> E*R.
        second: All experts' B as one linear layer, E*R -> out.
        route: The gates of the running forward pass.
        own: Whether `result` is a tensor of its own that may be written to.
        weight: The base layer's frozen weight (out, in), where `result = x weight^T` was computed without a gradient:
            then that for x comes from here, in one pass with the experts' own.

    Returns:
        (..., out).
    """
    if route.segments == () and weight is None:
        return result
    a, b = first.weight, second.weight
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    if not (is_whole(a, result.device) and is_whole(b, result.device)):
        # Sharded or offloaded weights come when their module is called.
        delta: Tensor = second(first(x.to(a.dtype)) * _gate(route, x, result).to(a.dtype))
        return result + delta.to(result.dtype)
    if torch.compiler.is_compiling():  # a compiler fuses these by itself
        return plain(x, result, a, b, _gate(route, x, result))
    if not route.segments or route.segments[-1][1] != x.shape[:-1].numel():  # the gate refuses other tokens
        fused: Tensor = Fused.apply(  # type: ignore[no-untyped-call]
            x, result, a, b, _gate(route, x, result), own and result.is_contiguous(), weight
        )
        return fused
    segmented: Tensor = Segmented.apply(  # type: ignore[no-untyped-call]
        x, result, a, b, route.columns, route.segments, own and result.is_contiguous(), weight
    )
    return segmented


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
    """`plain` on the weights themselves; gradients for x, result, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        result: Tensor,
        first: Tensor,
        second: Tensor,
        gate: Tensor,
        in_place: bool,
        weight: Tensor | None = None,
    ) -> Tensor:
        """X (..., in), result (..., out), first A (E*R, in), second B (out, E*R), gate (..., E*R), weight (out, in)."""
        dtype = result.dtype
        hidden_N = _rows(x).to(dtype) @ first.to(dtype).t()
        result_N = _rows(result)
        gated_N = hidden_N * _rows(gate)
        if in_place:
            torch.addmm(result_N, gated_N, second.to(dtype).t(), out=result_N)
            ctx.mark_dirty(result)
        else:
            result = torch.addmm(result_N, gated_N, second.to(dtype).t()).view_as(result)
        ctx.save_for_backward(x, hidden_N, first, second, gate, weight)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """D hidden = (d out B) * gate; dA = d hidden^T x; dB = d out^T (hidden * gate); dx = d hidden A."""
        x, hidden_N, first, second, gate, weight = ctx.saved_tensors
        wants_x, wants_result, wants_first, wants_second, *_ = ctx.needs_input_grad
        grad_N, gate_N, dtype = _rows(grad), _rows(gate), grad.dtype
        grad_hidden_N = (grad_N @ second.to(dtype)).mul_(gate_N)
        grad_x = None
        if wants_x:
            part, a = None if weight is None else grad_N @ weight, first.to(dtype)
            grad_x_N = grad_hidden_N @ a if part is None else part.addmm_(grad_hidden_N, a)
            grad_x = grad_x_N.view_as(x).to(x.dtype)
        grad_first = (grad_hidden_N.t() @ _rows(x).to(dtype)).to(first.dtype) if wants_first else None
        grad_second = (grad_N.t() @ (hidden_N * gate_N)).to(second.dtype) if wants_second else None
        return grad_x, grad if wants_result else None, grad_first, grad_second, None, None, None


class Segmented(torch.autograd.Function):
    """`plain`, segment by segment, with half the products of `Fused` where two of four experts count."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        result: Tensor,
        first: Tensor,
        second: Tensor,
        columns: Sequence[Columns],
        segments: Sequence[Segment],
        in_place: bool,
        weight: Tensor | None = None,
    ) -> Tensor:
        """X, result, first, second and weight as in `Fused`; columns and segments as in `Route`."""
        if in_place:
            ctx.mark_dirty(result)
        else:
            result = result.clone(memory_format=torch.contiguous_format)
        x_N, result_N = _rows(x).to(result.dtype), result.view(-1, result.shape[-1])
        own = {step: take(first, second, columns[step], x_N.dtype) for step in {segment[2] for segment in segments}}
        hidden_N = x_N.new_empty(len(x_N), max(len(a) for a, *_ in own.values()))
        for begin, end, step in segments:
            a, b, weights = own[step]
            hidden = torch.mm(x_N[begin:end], a.t(), out=hidden_N[begin:end, : len(a)]).mul_(weights)
            result_N[begin:end].addmm_(hidden, b.t())
        ctx.save_for_backward(x, hidden_N, first, second, weight)
        ctx.columns, ctx.segments = columns, segments
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """As in `Fused`, with each step's own A and B; their gradients go back to the columns they were taken from."""
        x, hidden_N, first, second, weight = ctx.saved_tensors
        wants_x, wants_result, wants_first, wants_second, *_ = ctx.needs_input_grad
        grad_N, x_N = _rows(grad), _rows(x).to(grad.dtype)
        own = {step: take(first, second, ctx.columns[step], grad.dtype) for step in {part[2] for part in ctx.segments}}
        grads = {step: (torch.zeros_like(a), torch.zeros_like(b)) for step, (a, b, _) in own.items()}
        grad_x_N = None
        if wants_x:
            grad_x_N = torch.empty_like(x_N) if weight is None else grad_N @ weight
        for begin, end, step in ctx.segments:
            (a, b, weights), (grad_a, grad_b) = own[step], grads[step]
            part = grad_N[begin:end]
            grad_hidden = (part @ b).mul_(weights)
            if grad_x_N is not None:
                grad_x_N[begin:end].addmm_(grad_hidden, a, beta=0 if weight is None else 1)
            if wants_first:
                grad_a.addmm_(grad_hidden.t(), x_N[begin:end])
            if wants_second:
                grad_b.addmm_(part.t(), hidden_N[begin:end, : len(a)])  # which hold the weights
        grad_first = torch.zeros_like(first) if wants_first else None
        grad_second = torch.zeros_like(second) if wants_second else None
        for step, (grad_a, grad_b) in grads.items():
            place = 0
            for stretch in ctx.columns[step][0]:
                there = slice(place, place := place + stretch.stop - stretch.start)
                if grad_first is not None:
                    grad_first[stretch] += grad_a[there]
                if grad_second is not None:
                    grad_second[:, stretch] += grad_b[:, there]
        grad_x = None if grad_x_N is None else grad_x_N.view_as(x).to(x.dtype)
        return grad_x, grad if wants_result else None, grad_first, grad_second, None, None, None, None


def columns_of(table: Tensor) -> list[Columns]:
    """The columns that count for each step, and their weights.

    Args:
        table: Weight of every column for every step, from the question on (1 + S, E*R), scaling included.
    """
    found = []
    for row in table:
        counts = (row != 0).int()
        edges = counts.diff(prepend=counts.new_zeros(1), append=counts.new_zeros(1)).nonzero().squeeze(1).tolist()
        found.append((tuple(map(slice, edges[::2], edges[1::2])), row[row != 0]))
    return found


def take(first: Tensor, second: Tensor, columns: Columns, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A step's own A (2R, in), B (out, 2R) and the weights of its columns (2R); R where there is no shared expert.

    Args:
        first: A of all experts (E*R, in).
        second: B of all experts (out, E*R).
        columns: Those of the step.
        dtype: To compute in.
    """
    stretches, weights = columns
    a = torch.cat([first[stretch] for stretch in stretches])
    b = torch.cat([second[:, stretch] for stretch in stretches], dim=1)
    return a.to(dtype), b.to(dtype), weights.to(dtype)


def fold(first: Tensor, second: Tensor, columns: Columns, dtype: torch.dtype) -> Fold:
    """`take` with the weights multiplied into B: a plain LoRA."""
    a, b, weights = take(first, second, columns, dtype)
    return a, b * weights


def _rows(x: Tensor) -> Tensor:
    """(..., D) as (N, D)."""
    return x.reshape(-1, x.shape[-1])
