"""The experts' product while text is written on a CPU: a few tokens a pass, where time goes to calls and to weights.

For each layer all that a pass needs is looked up once a text and kept: then a pass takes three products a layer,
without a call of the base layer, and where all tokens are in one step it reads the columns of that step alone.
Shapes: N tokens of all rows, D model (in, out), E expert, R rank.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mote.products import bind, is_plain
from mote.routing import NO_STEP
from mote.tuner.experts import Fold, Route, fold, is_whole

if TYPE_CHECKING:
    from mote.tuner.layer import MoteLinear

FEW = 64  # tokens of a pass, at most: a stretch of a prompt has more

Write = Callable[[Tensor, "Writing"], Tensor | None]  # a layer in a pass: (B, T, in) -> (B, T, out)


@dataclass
class Kept:
    """The layers' parts for an adapter and a step.

    Attributes:
        now: Of the text that is being written.
        memory: Of a step's own columns, of this text or the last one in the same cache: the system takes longer to hand
            out new memory than it takes to fill it.
    """

    now: dict[nn.Module, Write] = field(default_factory=dict)
    memory: dict[nn.Module, Fold] = field(default_factory=dict)

    def end_text(self) -> None:
        """Look everything up anew from here on."""
        self.now = {}


Texts = dict[tuple[str, int | None], Kept]  # by adapter and step, None for tokens in different ones


@dataclass(frozen=True)
class Writing:
    """A forward pass over a few tokens that go on with texts.

    Attributes:
        adapter: The one that is active.
        step: Of all tokens; None where they are in different ones.
        tokens: How many.
        routes: By rank.
        kept: What was looked up in earlier passes.
    """

    adapter: str
    step: int | None
    tokens: int
    routes: Mapping[tuple[str, int], Route]
    kept: Kept

    def forward(self, layer: "MoteLinear", x: Tensor) -> Tensor | None:
        """`MoteLinear.forward` of this pass: (B, T, out), or None where the layer has to go the plain way."""
        write = self.kept.now.get(layer)
        if write is None and (write := self._look_up(layer, x.dtype)) is None:
            return None
        return write(x, self)

    def _look_up(self, layer: "MoteLinear", dtype: torch.dtype) -> Write | None:
        """A layer's part, kept for later passes; None where the adapter is not on it or its weights lie elsewhere."""
        if self.adapter not in layer.ranks:
            return None
        first, second = layer.mote_A[self.adapter].weight, layer.mote_B[self.adapter].weight
        assert isinstance(first, Tensor) and isinstance(second, Tensor)
        if not (is_whole(first, torch.device("cpu")) and is_whole(second, torch.device("cpu"))):
            return None
        base, of_rank = _base(layer.base_layer, dtype), (self.adapter, layer.ranks[self.adapter])
        called = base is None  # its output may be somebody else's as well
        if self.step == NO_STEP:
            write = _without_experts(base or layer.base_layer)
        elif self.step is None:
            a, b = first.to(dtype), second.to(dtype)
            write = _with_experts(base or layer.base_layer, called, a.t(), b.t(), of_rank)
        else:
            into, columns = self.kept.memory.get(layer), self.routes[of_rank].columns[self.step]
            if into is not None and into[0].dtype != dtype:
                into = None
            with torch.inference_mode(False), torch.no_grad():  # the memory is for passes of either kind
                a, b = self.kept.memory[layer] = fold(first, second, columns, dtype, into)
            write = _with_experts(base or layer.base_layer, called, a.t(), b.t(), None)
        self.kept.now[layer] = write
        return write


def _without_experts(base: Callable[[Tensor], Tensor]) -> Write:
    return lambda x, _: base(x)


def _with_experts(
    base: Callable[[Tensor], Tensor], called: bool, a: Tensor, b: Tensor, gated: tuple[str, int] | None
) -> Write:
    """A layer with its experts.

    It is one function that looks nothing up, because nothing of this is in the processor's cache when a layer begins:
    the weights of the one before went through it. A few lines of Python less are 2 ms a token in SmolLM2-135M.

    Args:
        base: The base layer, or its product.
        called: Whether it is the layer itself, whose output is not written to.
        a: A of the columns that count (in, 2R or E*R).
        b: B of them (2R or E*R, out), with the columns' weights where they are one step's.
        gated: Adapter and rank of the gate, where tokens are in different steps.
    """
    inputs, outputs = len(a), b.shape[1]
    multiply = torch.mm  # oneDNN takes longer to begin than so small a product takes

    def write(x: Tensor, writing: Writing) -> Tensor | None:
        if gated is not None and x.numel() != writing.tokens * inputs:
            return None
        result = base(x)
        hidden_N = multiply(x.reshape(-1, inputs), a)
        if gated is not None:
            hidden_N *= writing.routes[gated].gate.view(hidden_N.shape)
        if called:
            return result + multiply(hidden_N, b).view_as(result)
        result.view(-1, outputs).addmm_(hidden_N, b)
        return result

    return write


def _base(layer: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """The product of a linear layer, where that may be used without a call of it."""
    if not is_plain(layer) or layer.weight.dtype != dtype or not is_whole(layer.weight, torch.device("cpu")):
        return None
    return bind(layer)
