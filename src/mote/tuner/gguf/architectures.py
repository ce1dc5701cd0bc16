"""How llama.cpp names and lays out each architecture, and which base models it can express.

Knows transformers' configurations and GGUF's names; knows nothing of adapters.
Shapes: D model (in, out), H query head, K key/value head.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map
from torch import Tensor

from mote.core.errors import UserError
from mote.tuner.gguf.file import Entry, Type, stored_type
from mote.tuner.gguf.source import EMBEDDING, HEAD, BaseWeights, empty_model

Form = Literal["gguf", "gguf-steps"]
SWITCH = "graniteswitch"
ATTENTION = ("q_proj", "k_proj", "v_proj")
LINEAR = (*(f"self_attn.{name}" for name in (*ATTENTION, "o_proj")), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
FUSED = ("self_attn.qkv_proj", "mlp.gate_up_proj")  # several of them as one layer: Phi 3


@dataclass(frozen=True)
class Architecture:
    """An architecture that can be written.

    Attributes:
        arch: The `gguf` package's name.
        rotary_pairs: Whether llama.cpp rotates adjacent elements of q and k, instead of elements half a head apart.
        norm_plus_one: Whether transformers stores norms as the difference to one.
        window_period: Every n-th layer has full attention, the others a window; 0 for no windows.
        rope_period: Every n-th layer has no rotary positions; 0 if all have them.
        tied: Whether the head must be tied to the embedding (True), must not be (False), or either (None).
        activation: Of the MLP.
        switch: Whether `graniteswitch` computes the same.
    """

    arch: MODEL_ARCH
    rotary_pairs: bool = False
    norm_plus_one: bool = False
    window_period: int = 0
    rope_period: int = 0
    tied: bool | None = None
    activation: str = "silu"
    switch: bool = False

    @property
    def name(self) -> str:
        """llama.cpp's name."""
        return str(MODEL_ARCH_NAMES[self.arch])


def _gemma(arch: MODEL_ARCH, window_period: int) -> Architecture:
    return Architecture(
        arch, norm_plus_one=True, window_period=window_period, tied=True, activation="gelu_pytorch_tanh"
    )


ARCHITECTURES = {
    "llama": Architecture(MODEL_ARCH.LLAMA, rotary_pairs=True, switch=True),
    "mistral": Architecture(MODEL_ARCH.LLAMA, rotary_pairs=True, switch=True),
    "granite": Architecture(MODEL_ARCH.GRANITE, rotary_pairs=True, switch=True),
    "qwen2": Architecture(MODEL_ARCH.QWEN2),
    "qwen3": Architecture(MODEL_ARCH.QWEN3),
    "phi3": Architecture(MODEL_ARCH.PHI3),
    "olmo2": Architecture(MODEL_ARCH.OLMO2, tied=False),
    "smollm3": Architecture(MODEL_ARCH.SMOLLM3, rotary_pairs=True, rope_period=4),
    "seed_oss": Architecture(MODEL_ARCH.SEED_OSS),
    "ernie4_5": Architecture(MODEL_ARCH.ERNIE4_5),
    "gemma": _gemma(MODEL_ARCH.GEMMA, 0),
    "gemma2": _gemma(MODEL_ARCH.GEMMA2, 2),
    "gemma3_text": _gemma(MODEL_ARCH.GEMMA3, 6),
}


def refusals(config: Any) -> dict[Form, str | None]:
    """Why a base model cannot be written in each form; None where it can.

    Args:
        config: The model's transformers configuration.
    """
    general = _unsupported(config)
    if general is None:
        names = [name for name, _ in empty_model(config).named_parameters()]
        general = _unmapped(config, names)
    if general is not None:
        return {"gguf": general, "gguf-steps": general}
    return {"gguf": _not_switch(config), "gguf-steps": None}


def _unsupported(config: Any) -> str | None:
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        return f"the architecture '{config.model_type}' is not one of {', '.join(ARCHITECTURES)}"
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != architecture.activation:
        return f"its activation '{activation}' is not {architecture.activation}"
    if architecture.tied not in (None, config.tie_word_embeddings):
        return f"its head is {'not ' if architecture.tied else ''}the embedding"
    return _unsupported_rope(config, architecture) or _unsupported_attention(config, architecture)


def _unsupported_rope(config: Any, architecture: Architecture) -> str | None:
    for rope in _ropes(config):
        kind = rope.get("rope_type", "default")
        known = {"default"} if architecture.window_period else {"default", "linear"}
        if kind not in known | ({"llama3"} if architecture.name == "llama" else set()):
            return f"rope scaling '{kind}' cannot be written to the file"
        if rope.get("partial_rotary_factor", 1) != 1:
            return "only a part of each head is rotated"
    layers = range(config.num_hidden_layers)
    rotated = getattr(config, "no_rope_layers", None) or [1] * len(layers)  # 1 where there are rotary positions
    if rotated != [int(not _is_last(layer, architecture.rope_period)) for layer in layers]:
        return f"the layers without rotary positions are not every {architecture.rope_period}th"
    return None


def _unsupported_attention(config: Any, architecture: Architecture) -> str | None:
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if not architecture.window_period:
        return f"it has an attention window of {window} tokens" if window else None
    full = [kind == "full_attention" for kind in config.layer_types]
    if full != [_is_last(layer, architecture.window_period) for layer in range(config.num_hidden_layers)]:
        return f"the layers with full attention are not every {architecture.window_period}th"
    if config.query_pre_attn_scalar != head_size(config):
        return f"query_pre_attn_scalar {config.query_pre_attn_scalar} is not the size of a head"
    if getattr(config, "use_bidirectional_attention", None):
        return "its attention is bidirectional"
    if architecture.arch is MODEL_ARCH.GEMMA3 and (config.attn_logit_softcapping or config.final_logit_softcapping):
        return "it caps logits"
    return None


def _ropes(config: Any) -> list[Any]:
    """The rotary settings of each kind of layer."""
    rope = config.rope_parameters
    return [rope] if "rope_theta" in rope else list(rope.values())


def _is_last(layer: int, period: int) -> bool:
    """Whether a layer is the last one of a period; never for period 0."""
    return bool(period) and (layer + 1) % period == 0


def _unmapped(config: Any, names: Iterable[str]) -> str | None:
    for name in names:
        try:
            gguf_name(config, name)
        except KeyError:
            return f"'{name}' cannot be written to the file"
    return None


def _not_switch(config: Any) -> str | None:
    """Why `graniteswitch` cannot compute what the base model does."""
    architecture = ARCHITECTURES[config.model_type]
    if not architecture.switch:
        return f"llama.cpp's {SWITCH} does not compute layers as '{config.model_type}' does"
    if (kind := config.rope_parameters.get("rope_type", "default")) != "default":
        return f"llama.cpp's {SWITCH} has no rope factors (rope scaling '{kind}')"
    for setting in ("attention_bias", "mlp_bias"):
        if getattr(config, setting, False):
            return f"llama.cpp's {SWITCH} has no biases ({setting})"
    return None


_name_map = cache(get_tensor_name_map)  # making it takes 50 ms


def gguf_name(config: Any, name: str) -> str:
    """A parameter's name in a GGUF file.

    Raises:
        KeyError: It has none.
    """
    names = _name_map(ARCHITECTURES[config.model_type].arch, config.num_hidden_layers)
    found = names.get_name(name, (".weight", ".bias"))
    if found is None:
        raise KeyError(name)
    return str(found)


def head_size(config: Any) -> int:
    """Width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rotary_rows(config: Any, module: str, weight: Tensor) -> Tensor:
    """Rows of a q or k matrix (H * D, n), bias (H * D) or `lora_B` as the file has them; others as they are."""
    kind = module.rpartition(".")[2]
    if kind not in ("q_proj", "k_proj") or not ARCHITECTURES[config.model_type].rotary_pairs:
        return weight
    heads = config.num_attention_heads if kind == "q_proj" else config.num_key_value_heads
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def add_shape(writer: Any, config: Any, rows: int) -> None:
    """Add the model's shape to a file's metadata.

    Args:
        writer: A `GGUFWriter`.
        config: The model's configuration.
        rows: Rows of its embedding.
    """
    size = head_size(config)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(size)
    writer.add_vocab_size(rows)
    if rope.get("rope_type") == "linear":
        writer.add_string(f"{writer.arch}.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(rope["factor"])
    architecture = ARCHITECTURES[config.model_type]
    if architecture.window_period:
        writer.add_sliding_window(config.sliding_window)
        local = config.rope_parameters.get("sliding_attention", config.rope_parameters)
        writer.add_float32(f"{writer.arch}.rope.freq_base_swa", local["rope_theta"])
        if config.attn_logit_softcapping:
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    elif writer.arch == SWITCH:
        writer.add_logit_scale(1.0)


def rope_factors(config: Any) -> Tensor | None:
    """Divisors of the rotary frequencies (D / 2) of Llama 3.1 and later; None for other models."""
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    size = head_size(config)
    plain = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.int64).float() / size)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    factors: Tensor = plain / scaled
    return factors


def base_entries(base: BaseWeights, wanted: Type, skip: Iterable[str] = ()) -> Iterator[Entry]:
    """The base model's weights, without its embedding and head.

    Args:
        base: The base model.
        wanted: Type of the matrices.
        skip: Names of parameters to leave out.
    """
    skipped = {f"{EMBEDDING}.weight", f"{HEAD}.weight", *skip}
    for name, shape in base.parameters.items():
        if name not in skipped:
            yield Entry(gguf_name(base.config, name), shape, stored_type(wanted, shape), partial(_read, base, name))
    factors = rope_factors(base.config)
    if factors is not None:
        yield Entry("rope_freqs.weight", tuple(factors.shape), "f32", factors.clone)


def _read(base: BaseWeights, name: str) -> Tensor:
    weight = rotary_rows(base.config, name.rpartition(".")[0], base.read(name))
    plus_one = ARCHITECTURES[base.config.model_type].norm_plus_one and name.endswith("norm.weight")
    return weight + 1 if plus_one else weight


def check_layers(base: BaseWeights, modules: Iterable[str]) -> None:
    """Check that the adapted layers can be written to a file.

    Raises:
        UserError: One has none.
    """
    for module in modules:
        known = any(f".{module}".endswith(f".{layer}") for layer in (*LINEAR, *FUSED))
        if not known or f"{module}.weight" not in base.parameters:
            raise UserError(
                f"adapter: it adapts {module}, which llama.cpp computes without experts; train with "
                f"target_modules from {sorted(layer.rpartition('.')[2] for layer in LINEAR)}"
            )
