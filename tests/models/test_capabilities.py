"""The table of what a base model can do, from its configuration alone."""

from transformers import (
    DogeConfig,
    FalconConfig,
    Gemma3Config,
    Gemma3TextConfig,
    JambaConfig,
    Llama4TextConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
)

from mote.models.capabilities import ABILITIES, EXPORTS, architecture_of, capabilities_of


def test_table_has_a_line_for_each_ability_and_format() -> None:
    lines = capabilities_of(LlamaConfig()).table().splitlines()
    assert lines[0] == "base         llama: attention"
    assert [line.split()[:2] for line in lines[1:]] == [[name, "yes"] for name in (*ABILITIES, *EXPORTS)]


def test_limits_name_the_layers_and_the_setting_to_change() -> None:
    limits = capabilities_of(JambaConfig()).limits
    assert "jamba has layers that keep a state (linear_attention)" in limits["skipping"]
    assert "train.skip_p=0" in limits["skipping"] and "train.method=mote-built" in limits["skipping"]
    assert "train.packing=false" in limits["packing"] and "train.skip_views=1" in limits["draws"]
    table = capabilities_of(JambaConfig()).table()
    assert "\nskipping     no    jamba" in table and "\nanswers      slow  jamba" in table


def test_attention_of_another_kind_is_another_architecture() -> None:
    names = {architecture_of(FalconConfig(alibi=alibi)) for alibi in (True, False)}
    names |= {architecture_of(Phi3Config(sliding_window=window)) for window in (None, 64)}
    assert len(names) == 4


def test_switch_of_a_configuration_is_another_architecture() -> None:
    later = Gemma3Config(text_config=Gemma3TextConfig(use_bidirectional_attention=True))
    assert architecture_of(later).endswith("sliding_attention, use_bidirectional_attention")
    assert architecture_of(OPTConfig(do_layer_norm_before=False)) == "opt: attention, do_layer_norm_before=no"
    layers = {"num_hidden_layers": 4, "per_layer_config": {1: {"skip": ["mlp"]}}}
    assert "per_layer_config.1.skip=mlp" in architecture_of(LlamaConfig(**layers))
    assert not capabilities_of(LlamaConfig(**layers)).known


def test_sizes_and_rope_are_no_other_architecture() -> None:
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    sizes = {"hidden_size": 64, "num_key_value_heads": 8, "tie_word_embeddings": True, "bos_token_id": None}
    assert architecture_of(LlamaConfig(rope_parameters=scaled, attention_bias=True, **sizes)) == "llama: attention"


def test_configuration_without_defaults_is_not_known() -> None:
    class Own(PreTrainedConfig):
        model_type = "llama"

        def __init__(self, width: int, **values: object) -> None:
            super().__init__(num_hidden_layers=2, sees_all=True, **values)

    assert architecture_of(Own(8)) == "llama: attention, num_hidden_layers, sees_all"


def test_length_from_which_a_row_matters_is_known() -> None:
    assert capabilities_of(DogeConfig(keep_window_size=128)).longest == 128
    assert capabilities_of(Llama4TextConfig(floor_scale=99)).longest == 98
    assert capabilities_of(LlamaConfig()).longest is None
