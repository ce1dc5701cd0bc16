"""What layers see, from configurations of many kinds."""

from typing import Any

import pytest
import transformers
from support.windows import BASES, REACH, SMALL

from mote.core.errors import UserError
from mote.models.layers import indexed_scaling, kv_layers, layers_of, masked_kinds

PLAIN = {"num_hidden_layers": 2}
KINDS: dict[str, tuple[str, dict[str, Any], list[tuple[str, int | None]]]] = {
    "llama": ("LlamaConfig", PLAIN, [("full", None)] * 2),
    "gpt2": ("GPT2Config", {"n_layer": 2}, [("full", None)] * 2),
    "mistral": ("MistralConfig", {**PLAIN, "sliding_window": 9}, [("sliding", 9)] * 2),
    "mistral without": ("MistralConfig", {**PLAIN, "sliding_window": None}, [("full", None)] * 2),
    "qwen2 without": ("Qwen2Config", {**PLAIN, "sliding_window": 9}, [("full", None)] * 2),
    "llama4": (
        "Llama4TextConfig",
        {**PLAIN, "attention_chunk_size": 7, "no_rope_layer_interval": 2},
        [("chunked", 7), ("full", None)],
    ),
    "lfm2": ("Lfm2Config", {**PLAIN, "layer_types": ["conv", "full_attention"]}, [("recurrent", None), ("full", None)]),
    "bamba": ("BambaConfig", {**PLAIN, "attn_layer_indices": [1]}, [("recurrent", None), ("full", None)]),
    "recurrent gemma": ("RecurrentGemmaConfig", PLAIN, [("recurrent", None)] * 2),
    "falcon-h1": ("FalconH1Config", PLAIN, [("recurrent", None)] * 2),
    "nested": (
        "Gemma3Config",
        {"text_config": {**PLAIN, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}},
        [("sliding", 5), ("full", None)],
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_follow_from_the_configuration(name: str) -> None:
    kind, given, expected = KINDS[name]
    assert [(layer.kind, layer.reach) for layer in layers_of(getattr(transformers, kind)(**given))] == expected


def config(name: str, **changes: Any) -> Any:
    kind, given = BASES[name]
    return getattr(transformers, kind)(**{**SMALL, **given, **changes})


def test_windows_of_single_layers_are_refused() -> None:
    config = transformers.MistralConfig(num_hidden_layers=4, per_layer_config={1: {"sliding_window": None}})
    with pytest.raises(UserError, match=r"model: mistral has layers with a sliding_window of their own.* use another"):
        layers_of(config)


def test_each_kind_of_attention_is_named_once() -> None:
    found = [(layer.name, layer.reach) for layer in masked_kinds(config("gemma3"))]
    assert found == [("sliding_attention", REACH), ("full_attention", None)]
    assert [layer.kind for layer in masked_kinds(config("mistral"))] == ["sliding"]


def test_shared_keys_are_those_of_the_last_layer_of_the_kind() -> None:
    assert kv_layers(config("gemma3n")) == kv_layers(config("gemma4 with shared keys")) == (0, 1, 0, 1)
    assert kv_layers(config("gemma3")) == (0, 1, 2, 3)


def test_only_llama_4_scales_by_index() -> None:
    assert indexed_scaling(config("llama4", floor_scale=99)) == 99
    assert indexed_scaling(config("llama4", attn_temperature_tuning=False)) is None
    assert indexed_scaling(config("llama4", no_rope_layers=[1, 1, 1, 1])) is None
    assert indexed_scaling(config("gemma3")) is None
