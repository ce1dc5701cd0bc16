"""Settings of `mote bench experts`, and the base model they name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mote.core.errors import UserError
from mote.experiments.bench.variants import BUILDERS, CONTROL, REFERENCE
from mote.models.embedded import EMBEDDED
from mote.models.load import default_attention, default_device, default_dtype, load_base

DTYPES = ("float32", "bfloat16", "float16")
MEASURES = ("training", "decoding", "saved", "memory", "peft")
SHAPES: dict[str, dict[str, Any]] = {  # shapes for models of random weights
    "llama-3.1-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "tie_word_embeddings": False,
    },
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 1024, "tie_word_embeddings": True,
    },
}  # fmt: skip


@dataclass(frozen=True)
class ExpertBenchSettings:
    """Everything that the numbers depend on; `choose_settings` fills in the device's defaults."""

    model: str | None
    shape: str | None
    device: str
    dtype: str
    rows: int
    length: int
    rounds: int
    compiled: bool
    checkpointing: bool
    threads: int
    variants: tuple[str, ...] = tuple(BUILDERS)
    measures: tuple[str, ...] = MEASURES
    eager: bool = True
    decoding_rows: tuple[int, ...] = (1, 8)


def choose_settings(
    model: str | None = None,
    shape: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    rows: int | None = None,
    length: int | None = None,
    rounds: int = 7,
    compiled: bool | None = None,
    checkpointing: bool = False,
    only: str | None = None,
    measures: str | None = None,
) -> ExpertBenchSettings:
    """The settings with the device's defaults; the reference and its A/A control are always measured.

    Raises:
        UserError: An unknown name, or two options that exclude each other.
    """
    device = default_device() if device == "auto" else device
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device: '{device}' is not available; use cpu")
    on_gpu = device.startswith("cuda")
    if model and shape:
        raise UserError(f"shape: '{shape}' and --model '{model}' exclude each other; give one of them")
    if not model and not shape:
        model, shape = (None, "llama-3.1-8b") if on_gpu else (EMBEDDED, None)
    for name, value in (("rows", rows), ("length", length), ("rounds", rounds)):
        if value is not None and value < 1:
            raise UserError(f"{name}: {value} is too few; give at least 1")
    wanted = _names("only", only, BUILDERS)
    return ExpertBenchSettings(
        model=model,
        shape=None if shape is None else _names("shape", shape, SHAPES)[0],
        device=device,
        dtype=default_dtype(device) if dtype == "auto" else _names("dtype", dtype, DTYPES)[0],
        rows=rows or (8 if on_gpu else 2),
        length=length or (2048 if on_gpu else 512),
        rounds=rounds,
        compiled=on_gpu if compiled is None else compiled,
        checkpointing=checkpointing,
        threads=torch.get_num_threads(),
        variants=tuple(name for name in BUILDERS if name in wanted or name in (REFERENCE, CONTROL)),
        measures=_names("measures", measures, MEASURES),
    )


def _names(option: str, given: str | None, known: Sequence[str] | Mapping[str, Any]) -> tuple[str, ...]:
    names = tuple(known) if given is None else tuple(given.split(","))
    for name in names:
        if name not in known:
            raise UserError(f"{option}: '{name}' is not known; use some of {', '.join(known)}")
    return names


def load_model(settings: ExpertBenchSettings) -> Any:
    """The base model, pretrained or with random weights of a shape."""
    if settings.model is not None:
        return load_base(settings.model, settings.device, settings.dtype).model
    assert settings.shape is not None
    return load_shape(settings.shape, settings.device, settings.dtype)


def load_shape(shape: str, device: str, dtype: str) -> Any:
    """A randomly initialised model of one of `SHAPES`, created on the device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**SHAPES[shape], bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=default_attention(device)
        )
