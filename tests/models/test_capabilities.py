"""The table of what a base model can do, from its configuration alone."""

from transformers import DogeConfig, FalconConfig, JambaConfig, LlamaConfig, Phi3Config

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


def test_length_from_which_attention_chooses_tokens_is_known() -> None:
    assert capabilities_of(DogeConfig(keep_window_size=128)).longest == 128
    assert capabilities_of(LlamaConfig()).longest is None
