"""The cache and the attention of continuous batching: rows of any length side by side, a shared beginning held once.

A forward pass takes one line of tokens of many rows: first one token of each row that is being written, then stretches
of prompts that are being read. Each row's own keys and values lie in a slot; what several prompts begin with lies in a
`Prefix` that they share, and is read once for all of them.
Shapes: B row that is written, N token of the pass, H query head, K key head, D head size, P token of a prefix,
C token that a slot can hold.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, Cache

SLOTS = "mote_slots"
_NEVER = float("-inf")
_ROUND = 64  # tokens; a slot grows by steps of this size


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values (K, P, D) of every layer of what several prompts begin with."""

    length: int
    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()


EMPTY = Prefix(0)


@dataclass(frozen=True)
class Reading:
    """A stretch of a prompt: tokens `start` to `stop` of the pass, in `slot` from place `place` on, behind `prefix`."""

    start: int
    stop: int
    slot: int
    place: int
    prefix: Prefix


@dataclass(frozen=True)
class Pass:
    """What one forward pass does.

    Attributes:
        cache: Where keys and values are.
        rows: How many rows are written, B.
        slots: Slot of each token (N); the first B are 0 ... B-1.
        places: Its place in the slot (N).
        lengths: Tokens that each written row has in its slot, the new one included (B).
        longest: The largest of them.
        prefixes: The prefixes of the written rows, each with the places of its rows.
        shared: Tokens of the longest of them.
        readings: The stretches of prompts behind the written rows.
        masks: What `mask` has made, by window.
    """

    cache: "SlotCache"
    rows: int
    slots: Tensor
    places: Tensor
    lengths: Tensor
    longest: int
    prefixes: Sequence[tuple[Prefix, Tensor | slice]]
    shared: int
    readings: Sequence[Reading]
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores of the written rows on their slots (B, 1, 1, longest): 0 where they see a place.

        None where there is one row and it sees all of its slot. Made once a pass, not once a layer.
        """
        if window not in self.masks:
            made = None
            if self.rows > 1 or window is not None:
                places = torch.arange(self.longest, device=self.lengths.device)
                hidden = _hidden(self.lengths[:, None] - 1, places, window)[:, None, None]
                made = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, _NEVER)
            self.masks[window] = made
        return self.masks[window]


_running: ContextVar[Pass] = ContextVar("_running")


@contextmanager
def running(work: Pass) -> Iterator[None]:
    """Let the attention of this thread know the pass that runs."""
    token = _running.set(work)
    try:
        yield
    finally:
        _running.reset(token)


class SlotCache(Cache):
    """Keys and values of all rows: for each layer (slots, K, C, D); a slot belongs to one row."""

    def __init__(self, slots: int) -> None:
        self.slots, self.rows, self.capacity = slots, 0, 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def reserve(self, rows: int, tokens: int) -> None:
        """Let the next pass find slots for so many rows of so many tokens each; what they hold stays.

        Their memory comes with the pass, layer by layer, for as many rows as there have been: the system takes a second
        to hand out that of 16 long ones.
        """
        self.rows = max(self.rows, min(self.slots, 1 << (rows - 1).bit_length()))
        self.capacity = max(self.capacity, -(-tokens // _ROUND) * _ROUND)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Keep the new tokens' keys and values (1, K, N, D) in their slots; the attention reads them from there."""
        work = _running.get()
        for held, new in ((self.keys, key_states[0]), (self.values, value_states[0])):
            if layer_idx == len(held):
                held.append(new.new_empty(0, new.shape[0], 0, new.shape[2]))
            rows, _K, tokens, _D = held[layer_idx].shape
            if rows < self.rows or tokens < self.capacity:
                grown = new.new_zeros(self.rows, new.shape[0], self.capacity, new.shape[2])
                grown[:rows, :, :tokens] = held[layer_idx]
                held[layer_idx] = grown
            self._put(held[layer_idx], new, work)
        return key_states, value_states

    @staticmethod
    def _put(held: Tensor, new: Tensor, work: Pass) -> None:
        """Write a layer's new keys or values (K, N, D) to its slots."""
        if (rows := work.rows) > 1:
            held[work.slots[:rows], :, work.places[:rows]] = new[:, :rows].transpose(0, 1)
        elif rows:
            held[0, :, work.longest - 1] = new[:, 0]
        for part in work.readings:
            end = part.place + part.stop - part.start
            held[part.slot, :, part.place : end] = new[:, part.start : part.stop]

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the first tokens of a slot into another one."""
        for held in (*self.keys, *self.values) if tokens else ():  # of none there may be no memory yet
            held[target, :, :tokens] = held[source, :, :tokens]

    def swap(self, one: int, other: int, tokens: int) -> None:
        """Exchange the first tokens of two slots."""
        for held in (*self.keys, *self.values):
            held[[one, other], :, :tokens] = held[[other, one], :, :tokens]

    def prefix(self, slot: int, tokens: int) -> Prefix:
        """A copy of a slot's first tokens, to be shared."""
        keys, values = (tuple(held[slot, :, :tokens].clone() for held in part) for part in (self.keys, self.values))
        return Prefix(tokens, keys, values)

    def get_seq_length(self, layer_idx: int = 0, *_: Any, **__: Any) -> int:
        """0: positions are given with each pass."""
        return 0


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
    """Attention of the tokens of a `Pass`, each to its row's tokens up to itself.

    Args:
        module: The attention layer; its `layer_idx` says where its keys are.
        query: (1, H, N, D).
        key: (1, K, N, D), in the cache already.
        value: (1, K, N, D), likewise.
        attention_mask: None; who sees whom follows from the pass.
        scaling: Factor on the scores, 1 / sqrt(D) where not given.
        softcap: Bound on the scores, as Gemma 2 has it.
        sliding_window: Tokens that a token sees, itself included.
        kwargs: What other attention functions take.

    Returns:
        The output (1, N, H, D) and no weights.
    """
    work, layer = _running.get(), int(module.layer_idx)  # type: ignore[arg-type]
    heads, factor = key.shape[1], scaling if scaling is not None else query.shape[-1] ** -0.5
    grouped_K_G_N_D = query.view(heads, -1, *query.shape[2:])
    rows, parts = work.rows, []
    if rows and softcap is None and not work.shared:
        mask = work.mask(sliding_window, query.dtype)
        parts.append(_write_own(work, layer, grouped_K_G_N_D[:, :, :rows], factor, mask))
    elif rows:
        scaled_K_B_G_D = grouped_K_G_N_D[:, :, :rows].transpose(1, 2) * factor
        parts.append(_write(work, layer, scaled_K_B_G_D, softcap, sliding_window))
    for part in work.readings:
        scaled_K_T_G_D = grouped_K_G_N_D[:, :, part.start : part.stop].transpose(1, 2) * factor
        parts.append(_read(work, layer, part, scaled_K_T_G_D, softcap, sliding_window))
    out_N_K_G_D = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out_N_K_G_D.flatten(1, 2)[None], None


def _write_own(work: Pass, layer: int, query_K_G_B_D: Tensor, factor: float, mask_B_1_1_C: Tensor | None) -> Tensor:
    """Attention (B, K, G, D) of one new token a row to its own slot: `_write` without prefixes and soft caps.

    It is PyTorch's own, for which the query heads of a group stand as tokens: they see the same.
    """
    own = slice(work.rows), slice(None), slice(work.longest)
    keys, values = work.cache.keys[layer][own], work.cache.values[layer][own]
    return scaled_dot_product_attention(query_K_G_B_D.permute(2, 0, 1, 3), keys, values, mask_B_1_1_C, scale=factor)


def _read(
    work: Pass, layer: int, part: Reading, query_K_T_G_D: Tensor, softcap: float | None, window: int | None
) -> Tensor:
    """Attention (T, K, G, D) of a stretch of a prompt."""
    prefix, end = part.prefix, part.place + part.stop - part.start
    keys, values = (held[layer][part.slot, :, :end] for held in (work.cache.keys, work.cache.values))
    if prefix.length:
        keys, values = (torch.cat(p, 1) for p in ((prefix.keys[layer], keys), (prefix.values[layer], values)))
    places = torch.arange(prefix.length + end, device=keys.device)
    hidden = _hidden(places[prefix.length + part.place :, None], places, window)
    weights = _weights(_scores(query_K_T_G_D, keys, softcap).masked_fill_(hidden[:, None], _NEVER))
    return _mix(weights, values).transpose(0, 1)


def _write(work: Pass, layer: int, query_K_B_G_D: Tensor, softcap: float | None, window: int | None) -> Tensor:
    """Attention (B, K, G, D) of one new token a row: to its own slot, and to its prefix with all rows that share it.

    One softmax goes over both; the scores of the prefixes are as wide as the longest one.
    """
    heads, rows, group, size = query_K_B_G_D.shape
    query_B_K_G_D = query_K_B_G_D.transpose(0, 1)
    mask, shared = work.mask(window, query_K_B_G_D.dtype), work.shared
    own = slice(rows * heads), slice(work.longest)
    keys, values = (held[layer].flatten(0, 1)[own] for held in (work.cache.keys, work.cache.values))
    scores = query_K_B_G_D.new_full((rows, heads, group, shared + work.longest), _NEVER)
    found = _scores(query_B_K_G_D.reshape(rows * heads, 1, group, size), keys, softcap).view(rows, heads, group, -1)
    scores[..., shared:] = found if mask is None else found + mask
    prefixes = [(prefix, members) for prefix, members in work.prefixes if prefix.length]
    for prefix, members in prefixes:
        found = _scores(query_K_B_G_D[:, members], prefix.keys[layer], softcap)
        if window is not None:
            places = torch.arange(prefix.length, device=keys.device)
            hidden = _hidden(prefix.length + work.lengths[members, None] - 1, places, window)
            found.masked_fill_(hidden[:, None], _NEVER)
        scores[members, ..., : prefix.length] = found.transpose(0, 1)
    weights = _weights(scores)
    out = _mix(weights[..., shared:].reshape(rows * heads, 1, group, -1), values)
    out_B_K_G_D = out.view(rows, heads, group, -1)
    for prefix, members in prefixes:
        part = weights[members, ..., : prefix.length].transpose(0, 1)
        out_B_K_G_D[members] += _mix(part, prefix.values[layer]).transpose(0, 1)
    return out_B_K_G_D


def _hidden(at: Tensor, places: Tensor, window: int | None) -> Tensor:
    """Which places a token at `at` does not see: later ones, and those before its window."""
    later = places > at
    return later if window is None else later | (places <= at - window)


def _scores(query_X_N_G_D: Tensor, keys_X_T_D: Tensor, softcap: float | None) -> Tensor:
    """Products (X, N, G, T) of queries with keys."""
    shape = query_X_N_G_D.shape[:3]
    scores = torch.bmm(query_X_N_G_D.flatten(1, 2), keys_X_T_D.transpose(1, 2)).view(*shape, -1)
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _weights(scores: Tensor) -> Tensor:
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)


def _mix(weights_X_N_G_T: Tensor, values_X_T_D: Tensor) -> Tensor:
    """Weighted sums (X, N, G, D) of the values."""
    return torch.bmm(weights_X_N_G_T.flatten(1, 2), values_X_T_D).view(*weights_X_N_G_T.shape[:3], -1)


AttentionInterface.register(SLOTS, slot_attention)
