"""What an architecture can do, compared on a tiny random copy, is what the package says of it."""

from typing import Any

import pytest
import torch
from check_models import BASES, config_of
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma3nConfig,
    Gemma3TextConfig,
    GraniteMoeHybridConfig,
    LlamaConfig,
    RecurrentGemmaConfig,
)

from mote.core.errors import UserError
from mote.inference import compare_base
from mote.inference.compare_base import answers_of, checked, compare, copy_of, described
from mote.inference.open_batch import open_batch
from mote.inference.sequential import SequentialLoop
from mote.models import capabilities
from mote.models.capabilities import MASKED, architecture_of
from mote.models.checked_bases import CHECKED
from mote.models.tiny_copy import tiny_config

AGAIN = {
    "Llama", "Qwen 2 with a window", "Gemma 3", "Llama 4", "gpt-oss", "DeepSeek V3", "Falcon with ALiBi",
    "Granite 4 hybrid", "LFM 2", "Jamba", "Qwen 3 MoE", "Mamba",
}  # fmt: skip


def test_at_least_thirty_bases_are_listed_and_all_are_known() -> None:
    assert len({model_type for _, model_type, _ in BASES}) >= 30
    found = {architecture_of(config_of(model_type, values)) for _, model_type, values in BASES}
    names = {"recurrent_gemma: attention, recurrent", "recurrent_gemma: linear_attention, sliding_attention"}
    assert found - names == CHECKED.keys() - names  # the second since transformers 5.24; it is compared when used


def test_recurrent_gemma_is_refused_in_every_release() -> None:
    assert {*MASKED, "answers"} <= checked(RecurrentGemmaConfig()).limits.keys()


@pytest.mark.parametrize("name", sorted(AGAIN))
def test_comparison_finds_what_is_listed(name: str) -> None:
    config = next(config_of(model_type, values) for base, model_type, values in BASES if base == name)
    assert compare(config) == CHECKED[architecture_of(config)]
    copy = copy_of(config)
    assert copy is not None
    with torch.no_grad():
        assert answers_of(copy, SequentialLoop(copy.model)) == 0


def test_known_architecture_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_base, "compare", lambda config: pytest.fail("compared"))
    assert checked(LlamaConfig()).known and not checked(LlamaConfig()).limits.keys() & set(MASKED)


@pytest.mark.parametrize(("layers", "limited"), [(["attention"], False), (["mamba", "attention"], True)])
def test_unknown_architecture_is_compared(layers: list[str], limited: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "CHECKED", {})
    config: Any = GraniteMoeHybridConfig(num_hidden_layers=8, layer_types=(layers * 8)[:8])
    found = checked(config)
    assert found.known and [ability in found.limits for ability in MASKED] == [limited] * 3


def test_model_that_sees_later_tokens_is_refused() -> None:
    assert "training" in checked(BertConfig()).limits
    model = AutoModelForCausalLM.from_config(tiny_config(BertConfig()))
    with pytest.raises(UserError, match=r"model: bert: the logits of a tiny copy differ.*use another base model"):
        open_batch(model, 2)


def test_model_of_a_known_type_that_sees_later_tokens_is_refused() -> None:
    found = checked(Gemma3TextConfig(use_bidirectional_attention=True))
    assert found.known and {"training", *MASKED} <= found.limits.keys()


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def needs_timm(*_: Any) -> None:
        raise ImportError(
            "\nTimmWrapperModel requires the timm library. You can install it with pip:\n`pip install timm`."
        )

    monkeypatch.setattr(compare_base, "tiny_model", needs_timm)
    with pytest.raises(
        UserError, match=r"model: gemma3n: TimmWrapperModel .* pip: `pip install timm`\.; or use another"
    ):
        checked(Gemma3nConfig())


def test_architecture_without_a_copy_enables_no_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "CHECKED", {})
    monkeypatch.setattr(compare_base, "tiny_config", lambda config: 1 / 0)
    found = checked(LlamaConfig(hidden_size=64))
    assert not found.known and not found.takes_masks and "answers" in found.limits
    assert "training" not in found.limits  # plain rows are transformers' own


def test_a_leaking_mask_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    def causal(segments_B_T: Tensor, *_: Any) -> Tensor:
        rows, length = segments_B_T.shape
        return torch.ones(length, length, dtype=torch.bool).tril().expand(rows, 1, -1, -1)

    monkeypatch.setattr(compare_base, "masks_for", lambda *_: causal)
    assert compare(LlamaConfig()) == MASKED


def test_a_batch_that_loses_its_cache_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    from mote.inference.kv_slots import SlotCache

    monkeypatch.setattr(SlotCache, "_write", staticmethod(lambda *_: None))
    assert compare(LlamaConfig()) == ("answers",)


def test_formats_that_need_merging_are_refused_if_quantised() -> None:
    config = LlamaConfig(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    limits = described(config).limits
    assert {"engine-steps", "merged", "vllm"} <= limits.keys() and "peft-steps" not in limits
    assert "skipping" not in limits
