"""CPU decoding fast path: with a few tokens per step, dispatch overhead and weight reads dominate.

Each layer's base matmul, `lora_A` and `lora_B` are looked up once and bound into one function: a decode step then takes
three matmuls a layer and no call of the base layer. Where all tokens are in one reasoning step, the function reads
contiguous copies of that step's expert columns only. The functions serve every KV cache: once per sequence, the weights
are compared with those that were bound.

The plain form in `mote.tuner.experts` is the reference.
Shapes: B row, T token, N tokens of all rows, E expert, R rank.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeGuard
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import Cache

from mote.models.kv_cache import given_cache
from mote.models.linear import bind, is_plain
from mote.tokens.routing import NO_STEP, QUESTION
from mote.tuner.expert_weights import Routes
from mote.tuner.experts import is_whole
from mote.tuner.step_runs import fold

MAX_TOKENS = 64  # of a decode step; a prefill chunk has more
_CPU = torch.device("cpu")


class AdaptedLinear(Protocol):
    """The parts of a layer with step experts that are read here."""

    base_layer: nn.Module
    mote_A: nn.ModuleDict
    mote_B: nn.ModuleDict
    ranks: dict[str, int]


BoundLayer = Callable[[Tensor, "DecodeStep"], Tensor | None]  # a layer's forward: (B, T, in) -> (B, T, out)


class CpuDecoder:
    """Recognises decode steps, and holds the bound layers of every adapter."""

    def __init__(self) -> None:
        self._bound: dict[tuple[str, torch.dtype], _BoundLayers] = {}

    def __reduce__(self) -> tuple[type["CpuDecoder"], tuple[()]]:
        return CpuDecoder, ()  # a copied or pickled model binds its own layers

    def begin_sequence(self, cache: Cache) -> None:
        """A prompt is prefilled into this cache: weights are compared before the next decode step."""
        for layers in self._bound.values():
            layers.checked.discard(cache)

    def clear(self) -> None:
        """Forget all bound layers, and with them the copies of expert columns."""
        self._bound.clear()

    def decode_step(
        self,
        call: Mapping[str, Any],
        adapters: Collection[str],
        steps: Mapping[str, Tensor],
        documents: Tensor | None,
        routes: Routes,
        training: bool,
    ) -> "DecodeStep | None":
        """The forward pass as a decode step of one token per row or document; None where it is anything else.

        Args:
            call: Arguments of the model's forward by name.
            adapters: The active ones.
            steps: Adapter -> step ids (B, T).
            documents: Document of each token (B, T), for packed rows.
            routes: Expert weights of the forward pass.
            training: Whether the model is in training mode.
        """
        ids = call.get("input_ids")
        cache = given_cache(call)
        if ids is None or ids.device != _CPU or not isinstance(cache, Cache):
            return None  # elsewhere reading the documents would wait for the device
        if ids.shape[1] > 1 and (documents is None or bool((documents.diff(dim=1) == 0).any())):
            self.begin_sequence(cache)
            return None
        if training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or len(adapters) != 1:
            return None
        (adapter,) = adapters
        steps_B_T = steps.get(adapter)
        if steps_B_T is None or steps_B_T.device.type != "cpu" or steps_B_T.numel() > MAX_TOKENS:
            return None
        found = set(steps_B_T.flatten().tolist())
        step = found.pop() if len(found) == 1 else None
        if step == QUESTION:  # most or all columns count, so that a copy would be as large as the experts
            step = None
        dtype = next(iter(routes.values())).weights.dtype
        layers = self._bound.setdefault((adapter, dtype), _BoundLayers())
        if cache not in layers.checked:
            layers.check(adapter, cache)
        one_row = ids.shape[0] == 1
        functions = layers.functions.setdefault((step, one_row), {})
        return DecodeStep(adapter, step, steps_B_T.numel(), one_row, routes, functions, layers)


@dataclass(frozen=True)
class _Source:
    """What a layer's functions were bound from.

    Attributes:
        identity: Its modules, the memory of their weights, and autograd's counts of writes to the experts.
        weights: `lora_A` and `lora_B`, detached.
        checksums: Theirs when the functions were bound.
    """

    identity: tuple[Any, ...]
    weights: tuple[Tensor, ...]
    checksums: tuple[Tensor, ...]

    def is_unchanged(self, layer: AdaptedLinear, adapter: str) -> bool:
        return self.identity == _identity(layer, adapter) and all(
            torch.equal(_checksum(weight), before) for weight, before in zip(self.weights, self.checksums, strict=True)
        )


@dataclass
class _BoundLayers:
    """The bound layers of one adapter.

    Attributes:
        functions: Step (None: tokens of the question or of several steps) and whether B = 1 -> layer -> function.
        sources: What each layer's functions were bound from.
        checked: KV caches for whose current sequence that was compared with the layers.
    """

    functions: dict[tuple[int | None, bool], dict[AdaptedLinear, BoundLayer]] = field(default_factory=dict)
    sources: dict[AdaptedLinear, _Source] = field(default_factory=dict)
    checked: WeakSet[Cache] = field(default_factory=WeakSet)

    def check(self, adapter: str, cache: Cache) -> None:
        """Forget every function if any layer or weight has changed; for the sequence in this cache."""
        self.checked.add(cache)  # first, so that a sequence that another thread begins now is compared again
        if not all(source.is_unchanged(layer, adapter) for layer, source in list(self.sources.items())):
            self.functions = {}
            self.sources = {}


@dataclass(frozen=True)
class DecodeStep:
    """A forward pass that decodes one token of each row or document.

    Attributes:
        adapter: The active adapter.
        step: The reasoning step of all tokens; None if they are in several or in the question.
        tokens: How many, N.
        one_row: Whether B = 1.
        routes: Expert weights of the forward pass.
        functions: The layers bound for such passes.
        layers: Those of all passes with this adapter.
    """

    adapter: str
    step: int | None
    tokens: int
    one_row: bool
    routes: Routes
    functions: dict[AdaptedLinear, BoundLayer]
    layers: _BoundLayers

    def forward(self, layer: AdaptedLinear, x: Tensor) -> Tensor | None:
        """Output (B, T, out) of a layer with its experts; None where it has to be computed the plain way."""
        function = self.functions.get(layer)
        if function is None and (function := self._bind(layer, x)) is None:
            return None
        return function(x, self)

    def _bind(self, layer: AdaptedLinear, x: Tensor) -> BoundLayer | None:
        """Bind a layer and keep the function; None if it lacks the adapter or its weights are sharded or offloaded."""
        identity = _identity(layer, self.adapter)
        if identity is None:
            return None
        lora_A = layer.mote_A[self.adapter].weight
        lora_B = layer.mote_B[self.adapter].weight
        assert isinstance(lora_A, Tensor) and isinstance(lora_B, Tensor)
        dtype = x.dtype
        one_row = self.one_row and x.dim() == 3
        key = (self.adapter, layer.ranks[self.adapter])
        matmul = _base_matmul(layer.base_layer, dtype)
        base = matmul or layer.base_layer
        calls_base = matmul is None
        if self.step == NO_STEP:
            function: BoundLayer = _bind_base(base)
        elif self.step is None:
            function = _bind_experts(base, calls_base, lora_A.to(dtype).t(), lora_B.to(dtype).t(), one_row, key)
        else:
            with torch.inference_mode(False), torch.no_grad():  # the copies serve passes in either mode
                a, b = fold(lora_A, lora_B, self.routes[key].columns[self.step], dtype)
            function = _bind_experts(base, calls_base, a.t(), b.t(), one_row, None)
        self.functions[layer] = function
        if layer not in self.layers.sources:
            weights = (lora_A.detach(), lora_B.detach())
            self.layers.sources[layer] = _Source(identity, weights, tuple(map(_checksum, weights)))
        return function


def _identity(layer: AdaptedLinear, adapter: str) -> tuple[Any, ...] | None:
    """The modules and memory that a layer's functions refer to, and autograd's counts of writes to the experts.

    Returns:
        None if the layer cannot be bound: it lacks the adapter, or its weights are sharded or offloaded.
    """
    if adapter not in layer.ranks:
        return None
    base = layer.base_layer
    lora_A = layer.mote_A[adapter].weight
    lora_B = layer.mote_B[adapter].weight
    if not (_is_dense(lora_A) and _is_dense(lora_B)):
        return None
    experts = (base, *_memory(lora_A), *_memory(lora_B), _version(lora_A), _version(lora_B))
    if not is_plain(base) or not is_whole(base.weight, _CPU):
        return experts
    return (*experts, type(base), *_memory(base.weight), id(base.bias))


def _is_dense(weight: Any) -> TypeGuard[Tensor]:
    return is_whole(weight, _CPU) and (weight.is_contiguous() or weight.t().is_contiguous())


def _memory(weight: Tensor) -> tuple[Any, ...]:
    """Address and layout of a weight; no other weight can have them while the functions hold this memory."""
    return weight.data_ptr(), weight.stride(), weight.dtype


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def _checksum(weight: Tensor) -> Tensor:
    """A weighted sum of each row (rows), which changes with any element by more than rounding.

    Autograd does not count every write (`weight.data`, other libraries' kernels). Reading all experts of SmolLM2-135M
    takes 5 ms, making the copies again 36 ms.
    """
    return weight.float() @ _factors(weight.shape[1])


@functools.cache
def _factors(columns: int) -> Tensor:
    """Different factors between 1 and 2 for the columns of a weight."""
    with torch.inference_mode(False):
        return 1 + torch.rand(columns, generator=torch.Generator().manual_seed(0))


def _bind_base(base: Callable[[Tensor], Tensor]) -> BoundLayer:
    return lambda x, _: base(x)


def _bind_experts(
    base: Callable[[Tensor], Tensor],
    calls_base: bool,
    a: Tensor,
    b: Tensor,
    one_row: bool,
    key: tuple[str, int] | None,
) -> BoundLayer:
    """Bind a layer with its experts.

    The function looks nothing up: the weights of the layer before have just evicted everything from the CPU's cache,
    and a few lines of Python less save 2 ms a token on SmolLM2-135M.

    Args:
        base: The base layer or its matmul.
        calls_base: Whether it is the layer itself, whose output must not be written to.
        a: `lora_A` of the columns in use (in, 2R or E*R).
        b: `lora_B` of the same (2R or E*R, out); for a single step with the expert weights multiplied in.
        one_row: Whether inputs are (1, N, in).
        key: Adapter and rank of the expert weights, where they are not multiplied into `b`.
    """
    in_features = len(a)
    out_features = b.shape[1]
    matmul = torch.mm  # oneDNN's dispatch takes longer than so small a matmul

    def forward(x: Tensor, decode: DecodeStep) -> Tensor | None:
        if key is not None and x.numel() != decode.tokens * in_features:
            return None
        x_N = x.squeeze(0) if one_row else x.flatten(0, -2)
        result = base(x if calls_base else x_N)
        hidden_N = matmul(x_N, a)
        if key is not None:
            hidden_N *= decode.routes[key].weights.view(hidden_N.shape)
        if calls_base:
            return result + matmul(hidden_N, b).view_as(result)
        result.addmm_(hidden_N, b)
        return result.unsqueeze(0) if one_row else result.view(*x.shape[:-1], out_features)

    return forward


def _base_matmul(layer: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """The base layer's matmul, if its weight may be used without calling the layer."""
    if not is_plain(layer) or layer.weight.dtype != dtype or not is_whole(layer.weight, _CPU):
        return None
    return bind(layer)
