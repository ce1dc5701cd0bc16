"""The experts of a linear layer on a CPU, where time goes with the number of products and a batch's steps can be seen.

What the experts add to a token of the question is merged into the layer's own weight when the model is loaded, so that
a prompt costs what it costs the base model. Tokens of a step are given the difference: experts that weigh as much in
the step as in the question (the shared one) drop out of it. The base model's own tokens are given what was merged, with
the sign turned. `mote.serve.vllm.experts` is the plain form, with which the tests compare this one.
Shapes: T token, N token that is given a difference, P packed projection, E expert, R rank, C column (of E*R), S step.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearBase
from vllm.utils.torch_utils import direct_register_custom_op

from mote.serve.vllm.experts import OnTop, Pair, Part, Product, parts_of
from mote.tokens.routing import QUESTION

Linear = Callable[[Tensor], Tensor]


class MergedGates:
    """What the tokens of the running batch have to be given on top of the question's experts.

    Args:
        table: Gates of the question, of each step and of the base model's tokens (1 + S + 1, E*R).

    Attributes:
        question: Gates of the question (E*R,), which are merged.
        columns: Columns in which a step differs from the question, and those in which the base model alone does.
        rows: Indices (N,) of the tokens that are given anything; None where that is all of them.
        given: Of each set of columns that this batch needs, the gates (N, 1, C).
    """

    def __init__(self, table: Tensor) -> None:
        self.question = table[QUESTION]
        differences = table - table[QUESTION]
        of_steps = differences[:-1].any(0)
        of_base = differences[-1].bool() & ~of_steps
        self.columns = [mask.nonzero()[:, 0] for mask in (of_steps, of_base) if mask.any()]
        self._tables = [differences[:, columns] for columns in self.columns]
        moved = torch.stack([table.any(1) for table in self._tables], dim=1)  # (1 + S + 1, sets of columns)
        self._sets = torch.where(moved, torch.arange(1, len(self._tables) + 1), 0).amax(1)  # how many a token needs
        self.rows: Tensor | None = None
        self.given: list[Tensor] = []

    def set(self, steps: Tensor) -> None:
        """Take the gates of a batch whose tokens are in these steps (T,)."""
        steps = steps.long()
        sets = self._sets[steps]
        self.rows = None if sets.all() else sets.nonzero()[:, 0]
        if self.rows is not None:
            steps = steps[self.rows]
        self.given = [table[steps][:, None] for table in self._tables[: int(sets.max())]]


class Columns(NamedTuple):
    """Some columns of the experts of a layer: all A in one product, a B for each projection.

    The products are vLLM's own for this CPU, called without what it wraps around them.
    """

    first: Linear
    seconds: list[Linear]


class MergedExperts(OnTop):
    """A layer's own method, whose weight has the question's experts in it, and the differences on top.

    Args:
        layer: The layer.
        name: Under which compiled graphs find this.
        gates: Of the running batch.
        columns: Of each set in `gates.columns`.
        outputs: Where the outputs of each projection with experts are.
    """

    def __init__(
        self, layer: LinearBase, name: str, gates: MergedGates, columns: list[Columns], outputs: list[slice]
    ) -> None:
        super().__init__(layer.quant_method)
        self.name, self.gates, self.columns, self.outputs = name, gates, columns, outputs

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Outputs (T, out) of inputs x (T, in)."""
        out: Tensor = self.method.apply(layer, x, bias)
        if torch.compiler.is_compiling():  # a graph cannot look at the steps: there the differences are one operation
            torch.ops.vllm.mote_add(out, x, self.name)
        else:
            self.add(out, x)
        return out

    def add(self, out: Tensor, x: Tensor) -> None:
        """Give the tokens of inputs x (T, in) their differences, in the layer's outputs (T, out)."""
        gates, rows = self.gates.given, self.gates.rows
        if not gates:
            return
        x_N = x if rows is None else x[rows]
        for columns, gate in zip(self.columns, gates, strict=False):
            hidden = columns.first(x_N).view(len(x_N), len(self.outputs), -1)
            hidden.mul_(gate)
            for place, (outputs, second) in enumerate(zip(self.outputs, columns.seconds, strict=True)):
                added = second(hidden[:, place])
                if rows is None:
                    out[:, outputs].add_(added)
                else:
                    out[:, outputs].index_add_(0, rows, added)


def add_experts(
    layer: LinearBase, name: str, pairs: Mapping[int, Pair], gates: MergedGates, layers: MutableMapping[str, Any]
) -> None:
    """Put experts on a layer whose weight is in no other form yet than its matrix.

    Args:
        layer: A linear layer of vLLM.
        name: Its name in the model.
        pairs: Experts by the position of their projection in the layer; the others get none.
        gates: Of the running batch.
        layers: Where vLLM's compiled graphs look layers up by their names.
    """
    parts = parts_of(layer, pairs, gates.question)
    merge(layer.weight, parts, gates.question)
    columns = [
        Columns(_linear_of(torch.cat([part.first[of] for part in parts])), [_linear_of(p.second[:, of]) for p in parts])
        for of in gates.columns
    ]
    method = MergedExperts(layer, f"{name}.mote", gates, columns, [part.outputs for part in parts])
    layers[method.name] = layer.quant_method = method


@torch.no_grad()
def merge(weight: Tensor, parts: Sequence[Part], gates: Tensor) -> None:
    """Add to a layer's weight (out, in) what experts with these gates (E*R,) add to its outputs."""
    for part in parts:
        weight[part.outputs] += (part.second * gates) @ part.first


def _linear_of(weight: Tensor) -> Linear:
    product: Any = Product(weight)
    return partial(product.cpu_linear, weight=product.weight, bias=None)


def _add(out: Tensor, x: Tensor, name: str) -> None:
    get_forward_context().no_compile_layers[name].add(out, x)


def _add_nothing(out: Tensor, x: Tensor, name: str) -> None:
    """What a graph is told of it: only that `out` changes."""


direct_register_custom_op(op_name="mote_add", op_func=_add, mutates_args=["out"], fake_impl=_add_nothing)
