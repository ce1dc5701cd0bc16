"""Step experts on a CPU, where the number of matmuls costs and the batch's steps can be read on the host.

The question's experts are merged into the layer's weight when the model is loaded, so that prefilling a prompt costs
what it costs the base model. Tokens of a step get the difference between their expert weights and the question's;
experts with equal weight in both (the shared one) drop out. Tokens of base-model requests get the negative of what was
merged. `mote.serve.vllm.experts` is the reference implementation that the tests compare with.
Shapes: T token, N token that gets a difference, P packed projection, E expert, R rank, S step;
in and out are a layer's features.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearBase
from vllm.utils.torch_utils import direct_register_custom_op

from mote.serve.vllm.experts import Pair, Part, SmallLinear, WrappedMethod, shards
from mote.tokens.routing import QUESTION

Linear = Callable[[Tensor], Tensor]


class MergedExpertWeights:
    """Differences between the expert weights of the running batch's tokens and the merged ones of the question.

    Args:
        table: Expert weights of the question, of each step and of base-model requests (1 + S + 1, E*R).

    Attributes:
        question: Expert weights of the question (E*R,), which are merged.
        columns: Columns in which some step differs from the question; columns in which only the base model does.
        rows: Indices (N,) of the tokens with a difference; None if all have one.
        differences: For each set of columns that this batch needs, the differences (N, 1, columns).
    """

    def __init__(self, table: Tensor) -> None:
        self.question = table[QUESTION]
        differences = table - table[QUESTION]
        of_steps = differences[:-1].any(0)
        of_base = differences[-1].bool() & ~of_steps
        self.columns = [mask.nonzero()[:, 0] for mask in (of_steps, of_base) if mask.any()]
        self._tables = [differences[:, columns] for columns in self.columns]
        differs = torch.stack([table.any(1) for table in self._tables], dim=1)  # (1 + S + 1, sets of columns)
        # How many sets of columns a token of each step needs.
        self._sets = torch.where(differs, torch.arange(1, len(self._tables) + 1), 0).amax(1)
        self.rows: Tensor | None = None
        self.differences: list[Tensor] = []

    def set(self, steps: Tensor) -> None:
        """Look up the differences of a batch with these step ids (T,)."""
        steps = steps.long()
        sets = self._sets[steps]
        self.rows = None if sets.all() else sets.nonzero()[:, 0]
        if self.rows is not None:
            steps = steps[self.rows]
        self.differences = [table[steps][:, None] for table in self._tables[: int(sets.max())]]


class Columns(NamedTuple):
    """Some columns of a layer's experts: one matmul for all `lora_A`, one per packed projection for `lora_B`.

    They call vLLM's CPU kernel directly, without the layer around it.
    """

    lora_A: Linear
    lora_B: list[Linear]


class MergedExpertMethod(WrappedMethod):
    """Runs a layer whose weight includes the question's experts, then adds the differences.

    Args:
        layer: The layer.
        name: Name under which compiled graphs look this up.
        weights: Differences of the running batch.
        columns: The experts' columns of each set in `weights.columns`.
        outputs: The outputs of each packed projection with experts.
    """

    def __init__(
        self, layer: LinearBase, name: str, weights: MergedExpertWeights, columns: list[Columns], outputs: list[slice]
    ) -> None:
        super().__init__(layer.quant_method)
        self.name = name
        self.weights = weights
        self.columns = columns
        self.outputs = outputs

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Outputs (T, out) of inputs x (T, in)."""
        out: Tensor = self.method.apply(layer, x, bias)
        if torch.compiler.is_compiling():  # a graph cannot branch on the steps: there this is one custom op
            torch.ops.vllm.mote_add(out, x, self.name)
        else:
            self.add(out, x)
        return out

    def add(self, out: Tensor, x: Tensor) -> None:
        """Add to the outputs (T, out), in place, the differences for inputs x (T, in)."""
        differences = self.weights.differences
        rows = self.weights.rows
        if not differences:
            return
        x_N = x if rows is None else x[rows]
        for columns, difference in zip(self.columns, differences, strict=False):
            hidden = columns.lora_A(x_N).view(len(x_N), len(self.outputs), -1)
            hidden.mul_(difference)
            for index, (outputs, lora_B) in enumerate(zip(self.outputs, columns.lora_B, strict=True)):
                added = lora_B(hidden[:, index])
                if rows is None:
                    out[:, outputs].add_(added)
                else:
                    out[:, outputs].index_add_(0, rows, added)


def add_experts(
    layer: LinearBase,
    name: str,
    pairs: Mapping[int, Pair],
    weights: MergedExpertWeights,
    layers: MutableMapping[str, Any],
) -> None:
    """Add experts to a layer whose weight vLLM has not repacked yet.

    Args:
        layer: A linear layer of vLLM.
        name: Its name in the model.
        pairs: Experts by the index of their projection in the layer; projections not named get none.
        weights: Differences of the running batch.
        layers: vLLM's registry in which compiled graphs look layers up by name.
    """
    parts = shards(layer, pairs, weights.question)
    merge(layer.weight, parts, weights.question)
    columns = [
        Columns(
            lora_A=_linear(torch.cat([part.lora_A[chosen] for part in parts])),
            lora_B=[_linear(part.lora_B[:, chosen]) for part in parts],
        )
        for chosen in weights.columns
    ]
    method = MergedExpertMethod(layer, f"{name}.mote", weights, columns, [part.outputs for part in parts])
    layers[method.name] = layer.quant_method = method


@torch.no_grad()
def merge(weight: Tensor, parts: Sequence[Part], expert_weights: Tensor) -> None:
    """Add the experts, with these expert weights (E*R,), to a layer's weight (out, in) in place."""
    for part in parts:
        weight[part.outputs] += (part.lora_B * expert_weights) @ part.lora_A


def _linear(weight: Tensor) -> Linear:
    linear: Any = SmallLinear(weight)
    return partial(linear.cpu_linear, weight=linear.weight, bias=None)


def _add(out: Tensor, x: Tensor, name: str) -> None:
    get_forward_context().no_compile_layers[name].add(out, x)


def _add_nothing(out: Tensor, x: Tensor, name: str) -> None:
    """Fake implementation for tracing: only `out` is mutated."""


direct_register_custom_op(op_name="mote_add", op_func=_add, mutates_args=["out"], fake_impl=_add_nothing)
