"""The experts' product while text is written on a CPU: a few tokens a pass, where time goes to calls and to weights.

For each layer all that a pass needs is looked up once a text and kept: then a pass takes three products a layer,
without a call of the base layer, and where all tokens are in one step it reads the columns of that step alone.
Shapes: N tokens of all rows, D model (in, out), E expert, R rank.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from mote.products import bind, is_plain
from mote.routing import NO_STEP
from mote.tuner.experts import Route, fold, is_whole

if TYPE_CHECKING:
    from mote.tuner.layer import MoteLinear

FEW = 64  # tokens of a pass, at most: a stretch of a prompt has more


class Weights(NamedTuple):
    """A layer's own part.

    Attributes:
        base: The base layer's product (N, in) -> (N, out), None where the layer must be called: it is no plain linear
            layer, or somebody watches it.
        a: A of the columns that count (in, 2R or E*R); None where no token has a step.
        b: B of them (2R or E*R, out), with the columns' weights where they are one step's.
    """

    base: Callable[[Tensor], Tensor] | None
    a: Tensor | None
    b: Tensor | None


@dataclass
class Kept:
    """The layers' parts for an adapter and a step.

    Attributes:
        now: Of the text that is being written.
        before: Of the last one in the same cache: its memory is used again, which is a third of the time.
    """

    now: dict[nn.Module, Weights] = field(default_factory=dict)
    before: dict[nn.Module, Weights] = field(default_factory=dict)

    def end_text(self) -> None:
        """Look everything up anew from here on."""
        self.before, self.now = self.before | self.now, {}


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
        found, shape = self.kept.now.get(layer) or self._look_up(layer, x.dtype), x.shape
        x_N = x.reshape(-1, shape[-1])
        if found is None or len(x_N) != self.tokens:
            return None
        base, a, b = found
        if base is None:
            called: Tensor = layer.base_layer(x)  # what it gives may be somebody else's as well
            return called if a is None or b is None else called + (self._hidden(layer, x_N, a) @ b).view_as(called)
        result_N = base(x_N)
        if a is not None and b is not None:
            result_N.addmm_(self._hidden(layer, x_N, a), b)
        return result_N.view(*shape[:-1], -1)

    def _hidden(self, layer: "MoteLinear", x_N: Tensor, a: Tensor) -> Tensor:
        """Inputs of B (N, 2R or E*R)."""
        hidden_N = torch.mm(x_N, a)  # oneDNN takes longer to begin than so small a product takes
        if self.step is None:
            hidden_N *= self.routes[self.adapter, layer.ranks[self.adapter]].gate.view(hidden_N.shape)
        return hidden_N

    def _look_up(self, layer: "MoteLinear", dtype: torch.dtype) -> Weights | None:
        """A layer's part, kept for later passes; None where the adapter is not on it or its weights lie elsewhere."""
        if self.adapter not in layer.ranks:
            return None
        first, second = layer.mote_A[self.adapter].weight, layer.mote_B[self.adapter].weight
        assert isinstance(first, Tensor) and isinstance(second, Tensor)
        if not (is_whole(first, torch.device("cpu")) and is_whole(second, torch.device("cpu"))):
            return None
        a, b = first.to(dtype), second.to(dtype)
        if self.step is not None and self.step != NO_STEP:
            columns = self.routes[self.adapter, layer.ranks[self.adapter]].columns
            before, into = self.kept.before.pop(layer, None), None
            if before is not None and before.a is not None and before.b is not None and before.a.dtype == dtype:
                into = before.a.t(), before.b.t()
            with torch.inference_mode(False), torch.no_grad():  # the memory is for passes of either kind
                a, b = fold(first, second, columns[self.step], dtype, into)
        none = self.step == NO_STEP
        found = Weights(_base(layer.base_layer, dtype), None if none else a.t(), None if none else b.t())
        self.kept.now[layer] = found
        return found


def _base(layer: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """The product of a linear layer, where that may be used without a call of it."""
    if not is_plain(layer) or layer.weight.dtype != dtype or not is_whole(layer.weight, torch.device("cpu")):
        return None
    return bind(layer)
