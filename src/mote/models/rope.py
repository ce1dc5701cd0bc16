"""Rotary embeddings whose frequencies depend on the length of the sequence: `longrope` and `dynamic`.

transformers chooses them by the largest position of a forward pass. In a batch that is the position of the longest
sequence, and in a prefill chunk it is not the prompt's last one. Sequences of different regimes therefore go through
separate forward passes.
"""

from typing import Any

from torch import nn


def original_length(config: Any) -> int | None:
    """Longest sequence with the original frequencies, by a model's configuration; None if all lengths have them."""
    config = config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    lengths = []
    for rope in (parameters, *(nested for nested in parameters.values() if isinstance(nested, dict))):
        if rope.get("rope_type") == "longrope":
            lengths.append(rope["original_max_position_embeddings"])
        elif "dynamic" in (rope.get("rope_type") or ""):
            lengths.append(config.max_position_embeddings)
    return min(lengths, default=None)


class LengthDependentRope:
    """The rotary embeddings of a model that depend on the sequence length.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._dynamic: list[tuple[Any, str]] = []  # modules with the prefix of their buffers
        self._ropes: list[tuple[str, int]] = []  # type and longest length with the original frequencies
        for module in model.modules():
            types: Any = getattr(module, "rope_type", None)
            for layer_type, rope_type in types.items() if isinstance(types, dict) else [("", types)]:
                if rope_type == "longrope":
                    parameters: Any = module.config.rope_parameters  # type: ignore[union-attr]
                    parameters = parameters[layer_type] if layer_type else parameters
                    self._ropes.append((rope_type, int(parameters["original_max_position_embeddings"])))
                elif isinstance(rope_type, str) and "dynamic" in rope_type:
                    self._ropes.append((rope_type, int(module.original_max_seq_len)))  # type: ignore[arg-type]
                    self._dynamic.append((module, f"{layer_type}_" if layer_type else ""))

    def __bool__(self) -> bool:
        return bool(self._ropes)

    def regime(self, length: int) -> tuple[int, ...]:
        """Sequences of one regime have the same frequencies: 0 up to the original length, then 1 or the length."""
        return tuple(
            0 if length <= original else 1 if rope_type == "longrope" else length for rope_type, original in self._ropes
        )

    def is_short(self, length: int) -> bool:
        """Whether a sequence of this length has the original frequencies."""
        return not any(self.regime(length))

    def outdated(self, cached: int, length: int) -> bool:
        """Whether keys computed at length `cached` are recomputed at `length`, as transformers' `generate` does."""
        return any(rope_type == "longrope" and cached <= original < length for rope_type, original in self._ropes)

    def reset(self) -> None:
        """Forget the longest sequence so far, whose frequencies `dynamic` would keep."""
        for module, prefix in self._dynamic:
            original = getattr(module, f"{prefix}original_inv_freq")
            setattr(module, f"{prefix}inv_freq", original.to(getattr(module, f"{prefix}inv_freq").device))
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
