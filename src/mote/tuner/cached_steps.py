"""The step of the last token in a KV cache, so that a decoding loop need only pass its new tokens.

Knows transformers' `DynamicCache` and nothing of markers. The steps are forgotten once anybody else changes the cache:
crops, reorders, copies or extends it.
Shapes: B row.
"""

from collections.abc import Mapping
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import Tensor
from transformers import Cache, DynamicCache


class CachedSteps:
    """Steps by cache, for as long as the cache is in use."""

    def __init__(self) -> None:
        self._of_cache: WeakKeyDictionary[Cache, tuple[ReferenceType[Tensor], dict[str, Tensor]]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type["CachedSteps"], tuple[()]]:
        return CachedSteps, ()  # a copied or pickled model has seen no cache

    def remember(self, cache: Any, steps: Mapping[str, Tensor]) -> None:
        """Note the steps (B, 1) of a cache's last tokens, by adapter."""
        keys = _keys(cache)
        if keys is not None:
            self._of_cache[cache] = ref(keys), dict(steps)

    def recall(self, cache: Any, rows: int) -> dict[str, Tensor]:
        """The steps (B, 1) of a cache's last tokens, by adapter; empty if they are unknown."""
        keys = _keys(cache)
        if keys is None or cache not in self._of_cache:
            return {}
        seen, steps = self._of_cache[cache]
        # Whatever changes a DynamicCache makes a new tensor of keys.
        return steps if seen() is keys and len(keys) == rows else {}


def _keys(cache: Any) -> Tensor | None:
    """Keys of a cache's first attention layer."""
    if type(cache) is not DynamicCache:
        return None
    return next((keys for layer in cache.layers if isinstance(keys := getattr(layer, "keys", None), Tensor)), None)
