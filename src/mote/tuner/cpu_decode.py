"""The experts' product while text is written on a CPU: a few tokens a pass, where time goes to calls and to weights.

For each layer all that a pass needs is looked up once and kept: then a pass takes three products a layer, without a
call of the base layer, and where all tokens are in one step it reads copies of that step's columns alone. When a text
begins it is checked that the layers and their weights are still those.
Shapes: N tokens of all rows, D model (in, out), E expert, R rank.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from mote.models.linear import bind, is_plain
from mote.tokens.routing import NO_STEP
from mote.tuner.expert_weights import Route
from mote.tuner.experts import fold, is_whole

if TYPE_CHECKING:
    from mote.tuner.layer import MoteLinear

FEW = 64  # tokens of a pass, at most: a stretch of a prompt has more
_CPU = torch.device("cpu")

Write = Callable[[Tensor, "Writing"], Tensor | None]  # a layer in a pass: (B, T, in) -> (B, T, out)


@dataclass
class Kept:
    """What was looked up of an adapter's layers for the texts in a cache.

    Attributes:
        writes: By step, None for tokens in different ones, and whether they stand in one line; then by layer.
        made_of: Of each layer that was looked up, what that depends on.
        places: Parts of the layers' A and B, see `_places`.
        values: What was in those when the layers were looked up.
        holds: Whether that is known to be so for the text that is being written.
    """

    writes: dict[tuple[int | None, bool], dict[nn.Module, Write]] = field(default_factory=dict)
    made_of: dict["MoteLinear", tuple[Any, ...]] = field(default_factory=dict)
    places: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    holds: bool = True

    def begin_text(self, adapter: str) -> None:
        """Forget everything where the layers or their weights are not those of the text before."""
        layers = all(made_of == _made_of(layer, adapter) for layer, made_of in self.made_of.items())
        if self.values:  # put together once, not for each text
            self.values = [torch.cat(self.values)]
        if not layers or (self.places and not torch.equal(torch.cat(self.places), self.values[0])):
            self.writes, self.made_of, self.places, self.values = {}, {}, [], []
        self.holds = True

    def add(self, layer: "MoteLinear", adapter: str, made_of: tuple[Any, ...]) -> None:
        """A layer is looked up, for the first of its steps."""
        self.made_of[layer] = made_of
        for weight in (layer.mote_A[adapter].weight, layer.mote_B[adapter].weight):
            assert isinstance(weight, Tensor)
            self.places.append(_places(weight.detach()))
            self.values.append(self.places[-1].clone())


Texts = dict[tuple[str, torch.dtype], Kept]  # by adapter and what the model computes in


@dataclass(frozen=True)
class Writing:
    """A forward pass over a few tokens that go on with texts.

    Attributes:
        adapter: The one that is active.
        step: Of all tokens; None where they are in different ones.
        tokens: How many.
        line: Whether they stand in one line, B = 1.
        routes: By rank.
        writes: What was looked up for such passes.
        kept: The same for all passes.
    """

    adapter: str
    step: int | None
    tokens: int
    line: bool
    routes: Mapping[tuple[str, int], Route]
    writes: dict[nn.Module, Write]
    kept: Kept

    def forward(self, layer: "MoteLinear", x: Tensor) -> Tensor | None:
        """`MoteLinear.forward` of this pass: (B, T, out), or None where the layer has to go the plain way."""
        write = self.writes.get(layer)
        if write is None and (write := self._look_up(layer, x)) is None:
            return None
        return write(x, self)

    def _look_up(self, layer: "MoteLinear", x: Tensor) -> Write | None:
        """A layer's part, kept for later passes; None where the adapter is not on it or its weights lie elsewhere."""
        made_of = _made_of(layer, self.adapter)
        if made_of is None:
            return None
        first, second = layer.mote_A[self.adapter].weight, layer.mote_B[self.adapter].weight
        assert isinstance(first, Tensor) and isinstance(second, Tensor)
        dtype, line, of_rank = x.dtype, self.line and x.dim() == 3, (self.adapter, layer.ranks[self.adapter])
        product = _base(layer.base_layer, dtype)
        base, called = product or layer.base_layer, product is None  # its output may be somebody else's as well
        if self.step == NO_STEP:
            write = _without_experts(base)
        elif self.step is None:
            a, b = first.to(dtype), second.to(dtype)
            write = _with_experts(base, called, a.t(), b.t(), line, of_rank)
        else:
            with torch.inference_mode(False), torch.no_grad():  # they are for passes of either kind
                a, b = fold(first, second, self.routes[of_rank].columns[self.step], dtype)
            write = _with_experts(base, called, a.t(), b.t(), line, None)
        self.writes[layer] = write
        if layer not in self.kept.made_of:
            self.kept.add(layer, self.adapter, made_of)
        return write


def _made_of(layer: "MoteLinear", adapter: str) -> tuple[Any, ...] | None:
    """The modules and the memory that a layer's part holds on to, and how often autograd saw the experts written to.

    None where it has no part: the adapter is not on it, or its weights are sharded or offloaded.
    """
    if adapter not in layer.ranks:
        return None
    base, first, second = layer.base_layer, layer.mote_A[adapter].weight, layer.mote_B[adapter].weight
    if not (_is_dense(first) and _is_dense(second)):
        return None
    experts = (base, *_memory(first), *_memory(second), _version(first), _version(second))
    if not is_plain(base) or not is_whole(base.weight, _CPU):
        return experts
    return (*experts, type(base), *_memory(base.weight), id(base.bias))


def _is_dense(weight: Any) -> TypeGuard[Tensor]:
    return is_whole(weight, _CPU) and (weight.is_contiguous() or weight.t().is_contiguous())


def _memory(weight: Tensor) -> tuple[Any, ...]:
    """Where a weight lies and how. While somebody holds that memory nothing else can lie there."""
    return weight.data_ptr(), weight.stride(), weight.dtype


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def _places(weight: Tensor) -> Tensor:
    """A place or more in each row and in each column of a weight, as a view (places).

    Not all that writes to a weight is counted by autograd (`weight.data`, other libraries' kernels), and to compare all
    of it takes as long as to copy it.
    """
    lines = weight if weight.is_contiguous() else weight.t()
    # A step that has no divisor in common with a line's length comes to all places of a line before it repeats one.
    step = next(step for step in range(min(lines.shape), 0, -1) if math.gcd(step, lines.shape[1]) == 1)
    return lines.view(-1)[::step]


def _without_experts(base: Callable[[Tensor], Tensor]) -> Write:
    return lambda x, _: base(x)


def _with_experts(
    base: Callable[[Tensor], Tensor], called: bool, a: Tensor, b: Tensor, line: bool, gated: tuple[str, int] | None
) -> Write:
    """A layer with its experts.

    It is one function that looks nothing up, because nothing of this is in the processor's cache when a layer begins:
    the weights of the one before went through it. A few lines of Python less are 2 ms a token in SmolLM2-135M.

    Args:
        base: The base layer, or its product.
        called: Whether it is the layer itself, whose output is not written to.
        a: A of the columns that count (in, 2R or E*R).
        b: B of them (2R or E*R, out), with the columns' weights where they are one step's.
        line: Whether inputs are (1, N, in).
        gated: Adapter and rank of the gate, where tokens are in different steps.
    """
    inputs, outputs = len(a), b.shape[1]
    multiply = torch.mm  # oneDNN takes longer to begin than so small a product takes

    def write(x: Tensor, writing: Writing) -> Tensor | None:
        if gated is not None and x.numel() != writing.tokens * inputs:
            return None
        x_N = x.squeeze(0) if line else x.flatten(0, -2)
        result = base(x if called else x_N)
        hidden_N = multiply(x_N, a)
        if gated is not None:
            hidden_N *= writing.routes[gated].gate.view(hidden_N.shape)
        if called:
            return result + multiply(hidden_N, b).view_as(result)
        result.addmm_(hidden_N, b)
        return result.unsqueeze(0) if line else result.view(*x.shape[:-1], outputs)

    return write


def _base(layer: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """The product of a linear layer, where that may be used without a call of it."""
    if not is_plain(layer) or layer.weight.dtype != dtype or not is_whole(layer.weight, _CPU):
        return None
    return bind(layer)
