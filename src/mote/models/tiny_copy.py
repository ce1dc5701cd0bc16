"""A tiny random copy of a base model: the same architecture and kinds of layers, with sizes that compute in no time.

Knows the names that transformers' configurations give to sizes. The comparison itself is in
`mote.inference.compare_base`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mote.models.layers import layers_of

VOCAB = 64
REACH = 6  # tokens of a sliding window or of a chunk
_HIDDEN = 32
_HEADS = 4
_HEAD = 8
_SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_dim", "emb_dim", "lru_width"), _HIDDEN),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), _HEADS),
    **dict.fromkeys(("head_dim", "kv_channels", "qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), _HEAD),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "global_head_dim"), _HEAD),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "mamba_d_state", "state_size", "ssm_state_size"), _HEAD),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "block_size", "hidden_size_per_layer_input"), _HEAD),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "shared_intermediate_size"), 48),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "mamba_headdim", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 2 * _HIDDEN // 16),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups", "n_group", "topk_group"), 1),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank", "laurel_rank", "linear_num_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 512),
    "word_embed_proj_dim": _HIDDEN, "attn_layer_offset": 1, "attn_layer_period": 2, "linear_num_key_heads": 2,
    "linear_num_value_heads": _HEADS, "mamba_d_ssm": 2 * _HIDDEN, "query_pre_attn_scalar": _HEAD, "v_head_dim": 12,
}  # fmt: skip
_REACHES = ("window", "chunk", "topk", "local_attention")  # parts of names that say how far a layer sees
_NO_REACH = ("max_window_layers", "keep_window_size")  # a number of layers; `mote.models.capabilities` knows the other
_AT_MOST_2 = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "num_global_key_value_heads")


def tiny_config(config: Any) -> Any:
    """The configuration of a tiny copy: as many layers as it takes to have one of each kind, in the model's order.

    Args:
        config: The base model's configuration.

    Raises:
        ValueError: The sizes of this architecture do not follow from their names.
    """
    text = config.get_text_config(decoder=True)
    small = _smaller(text.to_dict(), _layer_count(text))
    if text is config:
        return type(config).from_dict(small)
    parts = {name: part for name in config.sub_configs if (part := getattr(config, name, None)) is not None}
    return type(config).from_dict(
        config.to_dict()
        | {name: small if part is text else _smaller(part.to_dict(), 2) for name, part in parts.items()}
        | {"quantization_config": None, "dtype": None}
    )


def tiny_model(config: Any, attention: str | None = None, seed: int = 0) -> Any:
    """A random model (float32, on the CPU) from a configuration of `tiny_config`.

    Norms and biases, which are ones and zeros in a new model, are random too.

    Args:
        config: The small configuration.
        attention: Name of its attention implementation; None for transformers' choice.
        seed: Seed of the weights; the caller's random state is left alone.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                nn.init.normal_(parameter, float("weight" in name), 0.1)
            elif name.endswith("bias"):
                nn.init.normal_(parameter, 0.0, 0.1)
    return model.eval()


def _layer_count(config: Any) -> int:
    """How many leading layers contain every kind; twice that if the last layers share keys of earlier ones."""
    names = [layer.name for layer in layers_of(config)]
    count = max([2, *(names.index(name) + 1 for name in set(names))])
    return 2 * count if getattr(config, "num_kv_shared_layers", None) else count


def _smaller(values: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """A configuration's values with small sizes; lists with one entry per layer are cut to the first layers."""
    whole = next((values[name] for name in _LAYERS if isinstance(values.get(name), int)), layers)
    small: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list | tuple) and len(value) == whole:
            small[name] = [_small_size(name, one) for one in value[:layers]]
        elif name == "per_layer_config" and value:  # layer -> what differs there
            small[name] = {layer: _smaller(own, layers) for layer, own in value.items() if int(layer) < layers}
        elif name in _KEY_HEADS and value is not None:
            heads = next(values[head] for head in ("num_attention_heads", "n_head", "n_heads") if values.get(head))
            small[name] = _HEADS if value == heads else min(2, value)
        else:
            small[name] = layers if name in _LAYERS else _small_size(name, value)
    for dropped in ("quantization_config", "architectures", "dtype", "torch_dtype", "transformers_version"):
        small.pop(dropped, None)
    if values.get("num_kv_shared_layers"):
        small["num_kv_shared_layers"] = layers // 2
    if (width := values.get("attention_hidden_size")) and values.get("hidden_size"):  # Zamba's is twice the hidden one
        small["attention_hidden_size"] = width * _HIDDEN // values["hidden_size"]
        small["attention_head_dim"] = small["attention_hidden_size"] // _HEADS
    if "expand" in values and "num_heads" in values:  # Mamba 2, whose heads share the expanded width
        small["head_dim"] = values["expand"] * _HIDDEN // _HEADS
    return small | ({"initializer_range": 0.3} if "initializer_range" in values else {})


def _small_size(name: str, value: Any) -> Any:
    if name.endswith("_token_id"):
        return None if value is None else 0
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        return value
    if name in _AT_MOST_2:
        return min(value, 2)
    reaches = name not in _NO_REACH and any(part in name for part in _REACHES)
    return _SIZES.get(name, min(value, REACH) if reaches else value)
