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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
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
        slots: Slot of each token (N); the first B are 0 ... B-1.
        places: Its place in the slot (N).
        lengths: Tokens that each written row has in its slot, the new one included (B).
        longest: The largest of them.
        prefixes: The prefixes of the written rows, each with the places of its rows.
        readings: The stretches of prompts behind the written rows.
    """

    cache: "SlotCache"
    slots: Tensor
    places: Tensor
    lengths: Tensor
    longest: int
    prefixes: Sequence[tuple[Prefix, Tensor | slice]]
    readings: Sequence[Reading]


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
        self.slots, self.capacity = slots, 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def reserve(self, tokens: int) -> None:
        """Make each slot hold at least so many tokens; what it holds stays."""
        if tokens <= self.capacity:
            return
        self.capacity = -(-tokens // _ROUND) * _ROUND
        for held in (self.keys, self.values):
            for layer, old in enumerate(held):
                held[layer] = old.new_zeros(*old.shape[:2], self.capacity, old.shape[3])
                held[layer][:, :, : old.shape[2]] = old

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Keep the new tokens' keys and values (1, K, N, D) in their slots; the attention reads them from there."""
        work = _running.get()
        for held, new in ((self.keys, key_states[0]), (self.values, value_states[0])):
            if layer_idx == len(held):
                held.append(new.new_zeros(self.slots, new.shape[0], self.capacity, new.shape[2]))
            held[layer_idx][work.slots, :, work.places] = new.transpose(0, 1)
        return key_states, value_states

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the first tokens of a slot into another one."""
        for held in (*self.keys, *self.values):
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
    heads, tokens = key.shape[1], query.shape[2]
    factor = scaling if scaling is not None else query.shape[-1] ** -0.5
    query_K_N_G_D = (query[0] * factor).view(heads, -1, tokens, query.shape[-1]).transpose(1, 2)
    out_K_N_G_D = query_K_N_G_D.new_empty(*query_K_N_G_D.shape[:3], value.shape[-1])
    if rows := len(work.lengths):
        out_K_N_G_D[:, :rows] = _write(work, layer, query_K_N_G_D[:, :rows], softcap, sliding_window)
    for part in work.readings:
        tokens_of = slice(part.start, part.stop)
        out_K_N_G_D[:, tokens_of] = _read(work, layer, part, query_K_N_G_D[:, tokens_of], softcap, sliding_window)
    return out_K_N_G_D.permute(1, 0, 2, 3).flatten(1, 2)[None], None


def _read(
    work: Pass, layer: int, part: Reading, query_K_T_G_D: Tensor, softcap: float | None, window: int | None
) -> Tensor:
    """Attention (K, T, G, D) of a stretch of a prompt."""
    prefix, end = part.prefix, part.place + part.stop - part.start
    keys, values = (held[layer][part.slot, :, :end] for held in (work.cache.keys, work.cache.values))
    if prefix.length:
        keys, values = (torch.cat(p, 1) for p in ((prefix.keys[layer], keys), (prefix.values[layer], values)))
    places = torch.arange(prefix.length + end, device=keys.device)
    hidden = _hidden(places[prefix.length + part.place :, None], places, window)
    return _mix(_weights(_scores(query_K_T_G_D, keys, softcap).masked_fill_(hidden[:, None], _NEVER)), values)


def _write(work: Pass, layer: int, query_K_B_G_D: Tensor, softcap: float | None, window: int | None) -> Tensor:
    """Attention (K, B, G, D) of one new token a row: to its own slot, and to its prefix with all rows that share it.

    One softmax goes over both; the scores of the prefixes are as wide as the longest one.
    """
    heads, rows, group, size = query_K_B_G_D.shape
    own = slice(rows * heads), slice(work.longest)
    keys, values = (held[layer].flatten(0, 1)[own] for held in (work.cache.keys, work.cache.values))
    query_B_K_G_D = query_K_B_G_D.transpose(0, 1)
    shared = max(prefix.length for prefix, _ in work.prefixes)
    scores = query_K_B_G_D.new_full((rows, heads, group, shared + work.longest), _NEVER)
    found = _scores(query_B_K_G_D.reshape(rows * heads, 1, group, size), keys, softcap)
    places = torch.arange(work.longest, device=keys.device)
    hidden = _hidden(work.lengths[:, None] - 1, places, window)[:, None, None]
    scores[..., shared:] = found.view(rows, heads, group, -1).masked_fill_(hidden, _NEVER)
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
    return out_B_K_G_D.transpose(0, 1)


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
