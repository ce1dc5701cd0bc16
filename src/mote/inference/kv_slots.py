"""KV cache and attention for continuous batching: one slot per sequence; shared prefixes are stored once.

The tokens of a forward pass are concatenated without padding: first one token of each decoding sequence, then chunks of
prompts that are prefilled. Each sequence keeps its own keys and values in a slot. A `Prefix` that several prompts share
is stored once and read once for all of them.
Shapes: B decoding sequence, N token of the forward pass, T token of a prefill chunk, H query head, K key head, J query
head of a key head, D head size, P token of a prefix, C token a slot can hold, X batch of a matmul.
"""

import math
import mmap
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, Cache
from typing_extensions import override

from mote.models.layers import Layer, indexed_scaling, kv_layers, layers_of

SLOTS = "mote_slots"
_MINUS_INFINITY = float("-inf")
_SLOT_STEP = 64  # tokens; slots grow in steps of this size


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values (K, P, D) of each layer for the tokens that several prompts start with."""

    length: int
    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()


EMPTY = Prefix(0)


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens [start, stop) of the forward pass, written to `slot` at `offset`, after the shared `prefix`."""

    start: int
    stop: int
    slot: int
    offset: int
    prefix: Prefix

    @property
    def end(self) -> int:
        """Offset after its last token."""
        return self.offset + self.stop - self.start


@dataclass(frozen=True)
class BatchPlan:
    """What one forward pass computes.

    Attributes:
        cache: Holds keys and values.
        decoding: Number of decoding sequences, B.
        slots: Slot of each token (N); the first B are 0 ... B-1.
        offsets: Offset of each token in its slot (N).
        positions: Position of each token in its sequence (N): its offset and the length of its prefix.
        lengths: Tokens each decoding sequence has in its slot, the new one included (B).
        longest: The largest of them.
        prefixes: Prefixes of the decoding sequences, each with the indices of its sequences.
        longest_prefix: Tokens of the longest of them.
        chunks: Prefill chunks, after the decoding sequences.
        masks: Masks computed so far, by the reach of the layer's kind.
    """

    cache: "SlotCache"
    decoding: int
    slots: Tensor
    offsets: Tensor
    positions: Tensor
    lengths: Tensor
    longest: int
    prefixes: Sequence[tuple[Prefix, Tensor | slice]]
    longest_prefix: int
    chunks: Sequence[PrefillChunk]
    masks: dict[Layer, Tensor | None] = field(default_factory=dict)

    def mask(self, layer: Layer, dtype: torch.dtype) -> Tensor | None:
        """Additive mask (B, 1, 1, longest) of the decoding sequences on their slots: 0 where visible.

        None for a single sequence that sees all of its slot. Computed once per forward pass and kind of layer.
        """
        if layer not in self.masks:
            mask = None
            if self.decoding > 1 or layer.reach is not None:
                positions = self.positions[: self.decoding, None]
                offsets = torch.arange(self.longest, device=positions.device)
                hidden = _hidden(positions, positions - self.offsets[: self.decoding, None] + offsets, layer)
                mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
                mask = mask.masked_fill_(hidden, _MINUS_INFINITY)[:, None, None]
            self.masks[layer] = mask
        return self.masks[layer]


_current_plan: ContextVar[BatchPlan] = ContextVar("_current_plan")


@contextmanager
def executing(plan: BatchPlan) -> Iterator[None]:
    """Give the attention of this thread the plan of the forward pass."""
    token = _current_plan.set(plan)
    try:
        yield
    finally:
        _current_plan.reset(token)


class SlotCache(Cache):
    """Keys and values of all sequences: (slots, K, C, D) per layer; a slot belongs to one sequence.

    Args:
        slots: Number of slots.
        config: The base model's configuration.
    """

    def __init__(self, slots: int, config: Any) -> None:
        super().__init__(layers=[])  # since 5.23 transformers asks every cache for its layers
        self.slots = slots
        self.layers_seen = layers_of(config)
        self.kv_layers = kv_layers(config)
        self.indexed = indexed_scaling(config) is not None
        self.rows = 0
        self.capacity = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def reserve(self, rows: int, tokens: int, limit: int) -> None:
        """Make room for this many slots of this many tokens in the next forward pass; their content is kept.

        Slots grow by a quarter, so that their content is copied a few times in all, and memory follows the text that
        there is, not the token budgets. The memory is allocated in the forward pass, layer by layer.

        Args:
            rows: Number of slots.
            tokens: Tokens of the longest sequence.
            limit: Tokens that the longest sequence will hold at most.
        """
        self.rows = max(self.rows, min(self.slots, 1 << (rows - 1).bit_length()))
        if tokens > self.capacity:
            grown = max(tokens, min(limit, self.capacity + self.capacity // 4))
            self.capacity = -(-grown // _SLOT_STEP) * _SLOT_STEP

    @override
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        plan = _current_plan.get()
        for layers, new in ((self.keys, key_states[0]), (self.values, value_states[0])):
            if layer_idx == len(layers):
                layers.append(new.new_empty(0, new.shape[0], 0, new.shape[2]))
            self._grow(layers, layer_idx)
            self._write(layers[layer_idx], new, plan)
        return key_states, value_states

    def _grow(self, layers: list[Tensor], index: int) -> None:
        """Give a layer the reserved room."""
        rows, heads, tokens, size = layers[index].shape
        if rows < self.rows or tokens < self.capacity:
            grown = _zeros(layers[index], (self.rows, heads, self.capacity, size))
            grown[:rows, :, :tokens] = layers[index]
            layers[index] = grown

    @staticmethod
    def _write(layer: Tensor, new: Tensor, plan: BatchPlan) -> None:
        """Write new keys or values (K, N, D) of a layer to its slots."""
        if (rows := plan.decoding) > 1:
            layer[plan.slots[:rows], :, plan.offsets[:rows]] = new[:, :rows].transpose(0, 1)
        elif rows:
            layer[0, :, plan.longest - 1] = new[:, 0]
        for chunk in plan.chunks:
            layer[chunk.slot, :, chunk.offset : chunk.end] = new[:, chunk.start : chunk.stop]

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the first tokens of one slot to another."""
        for layer in (*self.keys, *self.values) if tokens else ():  # without tokens there may be no memory yet
            layer[target, :, :tokens] = layer[source, :, :tokens]

    def swap(self, one: int, other: int, tokens: int) -> None:
        """Exchange the first tokens of two slots."""
        for layer in (*self.keys, *self.values):
            layer[[one, other], :, :tokens] = layer[[other, one], :, :tokens]

    def copy(self, slot: int, tokens: int) -> Prefix:
        """A copy of a slot's first tokens."""
        keys = tuple(layer[slot, :, :tokens].clone() for layer in self.keys)
        values = tuple(layer[slot, :, :tokens].clone() for layer in self.values)
        return Prefix(tokens, keys, values)

    def paste(self, copied: Prefix, slot: int, tokens: int, limit: int) -> None:
        """Write the first tokens of a copy to a slot that will hold at most `limit` tokens."""
        self.reserve(slot + 1, tokens, limit)
        for layers, parts in ((self.keys, copied.keys), (self.values, copied.values)):
            for index, part in enumerate(parts):
                self._grow(layers, index)
                layers[index][slot, :, :tokens] = part[:, :tokens]

    @override
    def get_seq_length(self, layer_idx: int = 0, *_: Any, **__: Any) -> Any:
        if not self.indexed:
            return 0  # every forward pass is given its positions
        # Llama 4 adds this to a token's index in the forward pass to know its position.
        positions = _current_plan.get().positions
        return positions - torch.arange(len(positions), device=positions.device)


def _zeros(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros of another tensor's dtype and device.

    On a CPU they are memory pages separate from the heap: unwritten pages take no memory, and freed ones go back to the
    system at once. Slots that grow inside the heap leave gaps as large as themselves.
    """
    if like.device.type != "cpu" or sys.platform == "win32":
        return like.new_zeros(shape)
    pages = mmap.mmap(-1, math.prod(shape) * like.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each token of a `BatchPlan` within its own sequence.

    Args:
        module: The attention layer; `layer_idx` selects what it sees, and its keys and values.
        query: (1, H, N, D).
        key: (1, K, N, D), already in the cache.
        value: (1, K, N, D), already in the cache.
        attention_mask: None; the plan determines visibility.
        scaling: Factor on the scores, 1 / sqrt(D) by default.
        softcap: Soft cap on the scores, as in Gemma 2.
        sliding_window: Number of tokens a token sees, itself included, as the model says it; known already.
        kwargs: Arguments of other attention functions, ignored.

    Returns:
        The output (1, N, H, D) and no weights.

    Raises:
        RuntimeError: The model's window is not that of its configuration.
    """
    plan = _current_plan.get()
    index = int(module.layer_idx)  # type: ignore[arg-type]
    layer = plan.cache.layers_seen[index]
    kv = plan.cache.kv_layers[index]
    if sliding_window is not None and sliding_window != layer.reach:
        raise RuntimeError(f"layer {index} has the window {sliding_window}, its configuration says {layer}")
    heads = key.shape[1]
    factor = scaling if scaling is not None else query.shape[-1] ** -0.5
    grouped_K_J_N_D = query.view(heads, -1, *query.shape[2:])
    rows = plan.decoding
    parts = []
    if rows and softcap is None and not plan.longest_prefix:
        mask = plan.mask(layer, query.dtype)
        parts.append(_decode_own(plan, kv, grouped_K_J_N_D[:, :, :rows], factor, mask))
    elif rows:
        scaled_K_B_J_D = grouped_K_J_N_D[:, :, :rows].transpose(1, 2) * factor
        parts.append(_decode(plan, kv, scaled_K_B_J_D, softcap, layer))
    for chunk in plan.chunks:
        scaled_K_T_J_D = grouped_K_J_N_D[:, :, chunk.start : chunk.stop].transpose(1, 2) * factor
        parts.append(_prefill(plan, kv, chunk, scaled_K_T_J_D, softcap, layer))
    out_N_K_J_D = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out_N_K_J_D.flatten(1, 2)[None], None


def _decode_own(plan: BatchPlan, kv: int, query_K_J_B_D: Tensor, factor: float, mask_B_1_1_C: Tensor | None) -> Tensor:
    """Attention (B, K, J, D) of one new token per sequence to its own slot: `_decode` without prefixes and soft cap.

    Uses PyTorch's kernel with the query heads of a group in place of query tokens: they see the same keys.
    """
    own = slice(plan.decoding), slice(None), slice(plan.longest)
    keys = plan.cache.keys[kv][own]
    values = plan.cache.values[kv][own]
    return scaled_dot_product_attention(query_K_J_B_D.permute(2, 0, 1, 3), keys, values, mask_B_1_1_C, scale=factor)


def _prefill(
    plan: BatchPlan, kv: int, chunk: PrefillChunk, query_K_T_J_D: Tensor, softcap: float | None, layer: Layer
) -> Tensor:
    """Attention (T, K, J, D) of a prefill chunk."""
    prefix = chunk.prefix
    keys = plan.cache.keys[kv][chunk.slot, :, : chunk.end]
    values = plan.cache.values[kv][chunk.slot, :, : chunk.end]
    if prefix.length:
        keys = torch.cat((prefix.keys[kv], keys), 1)
        values = torch.cat((prefix.values[kv], values), 1)
    indices = torch.arange(prefix.length + chunk.end, device=keys.device)
    hidden = _hidden(indices[prefix.length + chunk.offset :, None], indices, layer)
    weights = _softmax(_scores(query_K_T_J_D, keys, softcap).masked_fill_(hidden[:, None], _MINUS_INFINITY))
    return _weighted_sum(weights, values).transpose(0, 1)


def _decode(plan: BatchPlan, kv: int, query_K_B_J_D: Tensor, softcap: float | None, layer: Layer) -> Tensor:
    """Attention (B, K, J, D) of one new token per sequence to its slot and its prefix.

    One matmul computes a prefix's scores for all sequences that share it. One softmax covers prefix and slot; the
    scores of prefixes are as wide as the longest one.
    """
    heads, rows, group, size = query_K_B_J_D.shape
    query_B_K_J_D = query_K_B_J_D.transpose(0, 1)
    mask = plan.mask(layer, query_K_B_J_D.dtype)
    shared = plan.longest_prefix
    own = slice(rows * heads), slice(plan.longest)
    keys = plan.cache.keys[kv].flatten(0, 1)[own]
    values = plan.cache.values[kv].flatten(0, 1)[own]
    scores = query_K_B_J_D.new_full((rows, heads, group, shared + plan.longest), _MINUS_INFINITY)
    slot_scores = _scores(query_B_K_J_D.reshape(rows * heads, 1, group, size), keys, softcap)
    slot_scores = slot_scores.view(rows, heads, group, -1)
    scores[..., shared:] = slot_scores if mask is None else slot_scores + mask
    prefixes = [(prefix, members) for prefix, members in plan.prefixes if prefix.length]
    for prefix, members in prefixes:
        prefix_scores = _scores(query_K_B_J_D[:, members], prefix.keys[kv], softcap)
        if layer.reach is not None:
            indices = torch.arange(prefix.length, device=keys.device)
            hidden = _hidden(plan.positions[: plan.decoding][members, None], indices, layer)
            prefix_scores.masked_fill_(hidden[:, None], _MINUS_INFINITY)
        scores[members, ..., : prefix.length] = prefix_scores.transpose(0, 1)
    weights = _softmax(scores)
    out = _weighted_sum(weights[..., shared:].reshape(rows * heads, 1, group, -1), values)
    out_B_K_J_D = out.view(rows, heads, group, -1)
    for prefix, members in prefixes:
        part = weights[members, ..., : prefix.length].transpose(0, 1)
        out_B_K_J_D[members] += _weighted_sum(part, prefix.values[kv]).transpose(0, 1)
    return out_B_K_J_D


def _hidden(query_position: Tensor, key_position: Tensor, layer: Layer) -> Tensor:
    """Which keys a query does not see: later ones, and those before its window or chunk."""
    later = key_position > query_position
    return later if layer.reach is None else later | ~layer.within(query_position, key_position)


def _scores(query_X_N_J_D: Tensor, keys_X_T_D: Tensor, softcap: float | None) -> Tensor:
    """Attention scores (X, N, J, T)."""
    shape = query_X_N_J_D.shape[:3]
    scores = torch.bmm(query_X_N_J_D.flatten(1, 2), keys_X_T_D.transpose(1, 2)).view(*shape, -1)
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _softmax(scores: Tensor) -> Tensor:
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)


def _weighted_sum(weights_X_N_J_T: Tensor, values_X_T_D: Tensor) -> Tensor:
    """Attention outputs (X, N, J, D)."""
    return torch.bmm(weights_X_N_J_T.flatten(1, 2), values_X_T_D).view(*weights_X_N_J_T.shape[:3], -1)


AttentionInterface.register(SLOTS, slot_attention)
