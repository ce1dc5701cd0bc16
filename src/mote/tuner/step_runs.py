"""The experts' output run by run: on a CPU each run of tokens in one step multiplies that step's columns only.

With four experts of rank 16 these are 32 columns of 64, as many as in the LoRA of the same active rank. The whole form,
`mote.tuner.experts.Fused`, is the reference. Layers sped up by oneDNN, which compiles for each length, do not run so.
Shapes: N tokens of all rows, D model (in, out), E expert, R rank.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from mote.tuner.expert_weights import Columns, Run


def fold(lora_A: Tensor, lora_B: Tensor, columns: Columns, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A step's experts as one plain LoRA, with the expert weights multiplied into B.

    Args:
        lora_A: A of all experts (E*R, in).
        lora_B: B of all experts (out, E*R).
        columns: The step's columns and their weights.
        dtype: Dtype to compute in.

    Returns:
        A (2R, in), and B (out, 2R) stored column by column, which is faster for few rows; R instead of 2R without a
        shared expert.
    """
    slices, weights = columns
    a = torch.cat([lora_A[part].to(dtype) for part in slices])
    b = torch.cat([lora_B[:, part].to(dtype).t() for part in slices])
    return a, b.mul_(weights.to(dtype)[:, None]).t()


class FusedByRun(torch.autograd.Function):
    """`Fused` for tokens in runs of one step; tokens outside of all runs get the base layer's output alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        result: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        runs: Sequence[Run],
        columns: Sequence[Columns],
        in_place: bool,
        base_weight: Tensor | None = None,
        base_bias: Tensor | None = None,
    ) -> Tensor:
        """Arguments as in `Fused`, with the runs and the columns of each step in place of the expert weights."""
        if result is None:
            assert base_weight is not None
            result = linear(x, base_weight, base_bias)
        elif in_place:
            ctx.mark_dirty(result)
        else:
            result = result.clone(memory_format=torch.contiguous_format)
        result_N = result.view(-1, result.shape[-1])
        x_N = x.reshape(-1, x.shape[-1]).to(result.dtype)
        hidden = []
        for run, a, b in _of_runs(runs, columns, lora_A, lora_B, result.dtype):
            hidden_N = linear(x_N[run.start : run.stop], a)
            result_N[run.start : run.stop].addmm_(hidden_N, b.t())
            hidden.append(hidden_N)
        ctx.save_for_backward(x, lora_A, lora_B, base_weight, *hidden)
        ctx.runs = runs
        ctx.columns = columns
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of `Fused`, each run's added to the columns of its step."""
        x, lora_A, lora_B, base_weight, *hidden = ctx.saved_tensors
        wants_x, wants_result, wants_A, wants_B, *_ = ctx.needs_input_grad
        dtype = grad.dtype
        grad_N = grad.reshape(-1, grad.shape[-1])
        x_N = x.reshape(-1, x.shape[-1]).to(dtype)
        grad_x_N = None
        if wants_x:
            grad_x_N = torch.zeros_like(x_N) if base_weight is None else grad_N @ base_weight
        grads_A: dict[int, Tensor] = {}  # by step: (2R, in) ...
        grads_B: dict[int, Tensor] = {}  # ... and transposed (2R, out)
        for (run, a, b), hidden_N in zip(_of_runs(ctx.runs, ctx.columns, lora_A, lora_B, dtype), hidden, strict=True):
            tokens = slice(run.start, run.stop)
            own_N = grad_N[tokens]
            grad_hidden_N = own_N @ b
            if grad_x_N is not None:
                grad_x_N[tokens].addmm_(grad_hidden_N, a)
            if wants_A:
                _accumulate(grads_A, run.step, grad_hidden_N.t(), x_N[tokens])
            if wants_B:
                _accumulate(grads_B, run.step, hidden_N.t(), own_N)
        for step, grad_B_t in grads_B.items():
            grad_B_t.mul_(ctx.columns[step][1].to(dtype)[:, None])
        return (
            None if grad_x_N is None else grad_x_N.view_as(x).to(x.dtype),
            grad if wants_result else None,
            _scatter(grads_A, ctx.columns, lora_A) if wants_A else None,
            _scatter(grads_B, ctx.columns, lora_B.t()).t() if wants_B else None,
            *[None] * 5,
        )


def _of_runs(
    runs: Sequence[Run], columns: Sequence[Columns], lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype
) -> Iterator[tuple[Run, Tensor, Tensor]]:
    """Each run with A (2R, in) and B (out, 2R) of its step; the weights are multiplied into B."""
    of_step: dict[int, tuple[Tensor, Tensor]] = {}
    for run in runs:
        if run.step not in of_step:
            slices, weights = columns[run.step]
            a = torch.cat([lora_A[part].to(dtype) for part in slices])
            b = torch.cat([lora_B[:, part].to(dtype) for part in slices], dim=1)
            of_step[run.step] = a, b.mul_(weights.to(dtype))
        yield run, *of_step[run.step]


def _accumulate(grads: dict[int, Tensor], step: int, one: Tensor, other: Tensor) -> None:
    """Add the product of two matrices to the gradient of a step."""
    if step in grads:
        grads[step].addmm_(one, other)
    else:
        grads[step] = one @ other


def _scatter(grads: dict[int, Tensor], columns: Sequence[Columns], like: Tensor) -> Tensor:
    """The rows of each step's gradient, added up in those of all experts."""
    total = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    for step, grad in grads.items():
        begin = 0
        for own in columns[step][0]:
            end = begin + own.stop - own.start
            total[own] += grad[begin:end]
            begin = end
    return total
