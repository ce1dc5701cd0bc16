"""Infer past length and packing boundaries from the arguments of a model's forward.

Knows transformers' arguments and nothing of steps.
Shapes: B row, T token.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache


def packed_documents(call: Mapping[str, Any]) -> Tensor | None:
    """The document of each token (B, T) if transformers' own arguments say that rows are packed.

    Without a mask and a cache, transformers starts a new document wherever positions do not follow each other, and so
    do we (`DataCollatorWithFlattening`, padding-free training).
    """
    documents = call.get("seq_idx")
    if isinstance(documents, Tensor):
        return documents.long()
    if call.get("attention_mask") is not None or call.get("past_key_values") is not None:
        return None
    ids = call.get("input_ids")
    positions = call.get("position_ids")
    if not isinstance(ids, Tensor) or not isinstance(positions, Tensor) or positions.shape[1:] != ids.shape[1:]:
        return None
    return (positions.diff(prepend=positions[:, :1] - 1) != 1).cumsum(1).expand(len(ids), -1)


def has_past(call: Mapping[str, Any]) -> bool:
    """Whether tokens precede those of this forward pass, in a cache of whatever kind."""
    if any(call.get(name) is not None for name in ("cache_params", "state", "cache")):
        return True  # the caches of Mamba, of RWKV and of continuous batching
    length = cache_length(call.get("past_key_values"))
    if isinstance(length, Tensor) and torch.compiler.is_compiling():
        return True  # the value is unknown while compiling
    return bool(length > 0)


def cache_length(cache: Any) -> int | Tensor:
    """Number of tokens in a cache; for a static cache possibly a tensor on its device."""
    length: int | Tensor = cache.get_seq_length() if isinstance(cache, Cache) else 0
    return length
