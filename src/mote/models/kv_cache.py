"""The KV cache of a forward pass, by whatever name transformers gives it.

transformers 5.24 renamed `past_key_values`, and Mamba's `cache_params`, to `cache`, in arguments and in outputs.
"""

import inspect
from collections.abc import Mapping
from typing import Any

_NAMES = ("cache", "past_key_values", "cache_params")


def forward_arguments(model: Any) -> tuple[str, ...]:
    """Names of the arguments of a causal language model's forward pass, adapted or not."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return tuple(inspect.signature(base.forward).parameters)


def cache_argument(model: Any) -> str:
    """Name of the argument that takes the cache in the forward pass of a causal language model, adapted or not."""
    known = forward_arguments(model)
    return next((name for name in _NAMES if name in known), _NAMES[1])


def given_cache(call: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a forward pass; None without one."""
    return next((call[name] for name in _NAMES if call.get(name) is not None), None)


def returned_cache(output: Any) -> Any:
    """The cache in a model's output; None without one."""
    return next((getattr(output, name) for name in _NAMES if hasattr(output, name)), None)
