"""What the arguments of a model's forward pass say of the tokens before and between them.

It knows transformers' arguments and nothing of steps.
Shapes: B row, T token.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache


def packed_documents(given: Mapping[str, Any]) -> Tensor | None:
    """The document of each token (B, T) where transformers' own arguments say that rows are packed.

    Without a mask and a cache it takes positions that do not follow each other as the begin of another document, and so
    do we (`DataCollatorWithFlattening`, padding-free training).
    """
    ids, positions, documents = (given.get(name) for name in ("input_ids", "position_ids", "seq_idx"))
    if isinstance(documents, Tensor):
        return documents.long()
    if given.get("attention_mask") is not None or given.get("past_key_values") is not None:
        return None
    if not isinstance(ids, Tensor) or not isinstance(positions, Tensor) or positions.shape[1:] != ids.shape[1:]:
        return None
    return (positions.diff(prepend=positions[:, :1] - 1) != 1).cumsum(1).expand(len(ids), -1)


def goes_on(given: Mapping[str, Any]) -> bool:
    """Whether a forward pass goes on from tokens that it does not see."""
    if any(given.get(name) is not None for name in ("cache_params", "state", "cache")):
        return True  # the caches of Mamba, of RWKV and of continuous batching
    length = cache_length(given.get("past_key_values"))
    if isinstance(length, Tensor) and torch.compiler.is_compiling():
        return True  # a compiler cannot know
    return bool(length > 0)


def cache_length(cache: Any) -> int | Tensor:
    """Number of tokens in a cache; of a static one it may lie on the device."""
    length: int | Tensor = cache.get_seq_length() if isinstance(cache, Cache) else 0
    return length
