"""Step experts and marker rows on every kind of base model, as tiny random models; what is not supported is refused."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from support.reference import slow_layer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.integrations.finegrained_fp8 import FP8Linear

from mote.models.tiny_copy import tiny_config, tiny_model
from mote.tokens.routing import step_ids
from mote.tuner import MoteConfig
from mote.tuner.experts import plain
from mote.tuner.layer import MoteLinear
from mote.tuner.marker_rows import PutLogits, put_logits

MARKERS = {"analysis": [64, 65], "guidance": [66, 67], "response": [68, 69]}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
GPT2 = {
    "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "attn_pdrop": 0.0, "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
WINDOW = {"head_dim": 8, "sliding_window": 6}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied": ("LlamaConfig", {**SIZES, "tie_word_embeddings": True}),
    "llama untied": ("LlamaConfig", {**SIZES, "tie_word_embeddings": False}),
    "qwen2 tied": ("Qwen2Config", {**SIZES, "tie_word_embeddings": True}),
    "qwen2 untied": ("Qwen2Config", {**SIZES, "tie_word_embeddings": False}),
    "qwen3": ("Qwen3Config", {**SIZES, "head_dim": 8, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**SIZES, "sliding_window": 6}),
    "gemma2": ("Gemma2Config", {**SIZES, **WINDOW, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 9.0}),
    "gemma3": ("Gemma3TextConfig", {**SIZES, **WINDOW, "final_logit_softcapping": 5.0}),
    "gemma3 nested": (
        "Gemma3Config",
        {
            "text_config": {**SIZES, **WINDOW}, "vision_config": VISION, "mm_tokens_per_image": 4,
            "image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62,
        },
    ),
    "phi with biases": ("PhiConfig", SIZES),  # in the head too
    "phi3": ("Phi3Config", SIZES),
    "olmo2": ("Olmo2Config", SIZES),
    "gpt2": ("GPT2Config", GPT2),
    "gpt-neox": ("GPTNeoXConfig", {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {**SIZES, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    ),
    "mixtral": ("MixtralConfig", {**SIZES, "head_dim": 8, "num_local_experts": 4}),
}  # fmt: skip
TARGETS: dict[str, Any] = {  # all linear layers where no other are named
    "gemma3 nested": r".*language_model.*\.(self_attn|mlp)\.\w+_proj",
    "qwen3-moe": ATTENTION,
    "mixtral": ATTENTION,
}
LAYERS = {
    "gpt2": 8,
    "gpt-neox": 8,
    "phi with biases": 12,
    "phi3": 8,
    "qwen3-moe": 8,
    "mixtral": 8,
}  # of two blocks; else 14


def base_model(family: str) -> Any:
    torch.manual_seed(0)
    kind, values = FAMILIES[family]
    config = getattr(transformers, kind)(**values)
    if kind == "Gemma3Config":
        model = transformers.Gemma3ForConditionalGeneration(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():  # all ones or zeros in a random model, not in a real one
        if "norm" in name or "ln_" in name or name.endswith("bias"):
            nn.init.normal_(parameter, float("weight" in name), 0.1)
    return model.eval()


def adapter(family: str = "llama tied", **changes: Any) -> MoteConfig:
    given: dict[str, Any] = {
        "r": 2, "lora_alpha": 4, "markers": MARKERS, "turn_ids": [2], "vocab_size": 70,
        "target_modules": TARGETS.get(family, "all-linear"), "init_weights": False,
    }  # fmt: skip
    return MoteConfig(**{**given, **changes})


def trained(family: str, **changes: Any) -> Any:
    model = get_peft_model(base_model(family), adapter(family, **changes))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def some_ids() -> Tensor:
    """Rows whose steps begin at different positions; the last has no step."""
    ids = torch.randint(3, 59, (3, 14), generator=torch.Generator().manual_seed(2))
    ids[0, 3], ids[0, 6], ids[0, 10], ids[1, 4], ids[1, 8] = 64, 66, 68, 68, 2
    return ids


def layers_of(model: nn.Module) -> dict[str, MoteLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MoteLinear)}


every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_untrained_adapter_changes_nothing(family: str) -> None:
    base = base_model(family)
    ids = some_ids().clamp_max(63)
    before = base(input_ids=ids).logits
    model = get_peft_model(base, adapter(family, init_weights=True)).eval()
    assert torch.equal(model(input_ids=ids).logits[..., :64], before)
    assert model.get_input_embeddings().weight.shape[0] == 70


@every_family
def test_every_layer_equals_the_equation(family: str) -> None:
    model = trained(family)
    ids = some_ids()
    conf = model.peft_config["default"]
    seen: dict[MoteLinear, tuple[Tensor, Tensor]] = {}
    for layer in layers_of(model).values():
        layer.register_forward_hook(lambda layer, args, out: seen.update({layer: (args[0].clone(), out.clone())}))
    with torch.no_grad():
        model(input_ids=ids)
        steps = step_ids(ids, conf.routing)
        assert len(seen) == LAYERS.get(family, 14)
        for layer, (x, out) in seen.items():
            torch.testing.assert_close(out, slow_layer(layer, conf, x, steps), atol=1e-5, rtol=1e-5)


def step_of_training(model: Any) -> dict[str, Tensor]:
    """Gradients of all that is trained; no token is in the third step."""
    ids = some_ids()
    ids[ids == 68] = 3
    model.zero_grad()
    model(input_ids=ids, labels=ids, question_experts=torch.tensor([1, 2, 1])).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@every_family
def test_gradients_of_experts_and_markers_equal_the_plain_form(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(family).train()
    found = step_of_training(model)
    for name, gradient in found.items():
        if "mote_" in name:  # shared, analysis, guidance, response; the last has no token
            parts = gradient.split(2, dim=0 if "mote_A" in name else 1)
            assert [bool(part.abs().sum() > 0) for part in parts] == [True, True, True, False], name
        else:
            assert all(gradient[row].abs().sum() > 0 for row in (0, 2)), name  # the start markers that occur
    tied = len([name for name in found if "trainable_tokens" in name]) == 1
    assert tied == model.get_base_model().config.tie_word_embeddings

    monkeypatch.setattr(
        "mote.tuner.layer.add_experts", lambda x, out, a, b, route, *_: plain(x, out, a.weight, b.weight, route.weights)
    )
    monkeypatch.setattr(MoteLinear, "_frozen", lambda *_: None)
    monkeypatch.setattr(
        PutLogits, "apply", lambda out, x, rows, _, bias, ids: put_logits(out, x, rows, bias, ids), raising=False
    )
    for name, gradient in step_of_training(model).items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@every_family
def test_round_trip_is_exact_and_small(family: str, tmp_path: Path) -> None:
    model = trained(family)
    ids = some_ids()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        model.save_pretrained(tmp_path)
        numbers = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * numbers + 20_000
        again = PeftModel.from_pretrained(base_model(family), tmp_path).eval()
        assert torch.equal(again(input_ids=ids).logits, before)
        quick = PeftModel.from_pretrained(base_model(family), tmp_path, low_cpu_mem_usage=True).eval()
        assert torch.equal(quick(input_ids=ids).logits, before)


@every_family
def test_cached_generation_equals_uncached(family: str) -> None:
    model = trained(family)
    ids = some_ids()
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**given), model.generate(**given, use_cache=False))


@pytest.mark.parametrize("tied", [True, False])
def test_markers_may_be_reserved_ids(tiny: Path, tied: bool, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(8)]
    tokenizer.add_special_tokens({"additional_special_tokens": reserved}, replace_extra_special_tokens=False)
    base = LlamaForCausalLM.from_pretrained(tiny, tie_word_embeddings=tied)
    if not tied:
        base.lm_head.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    base.resize_token_embeddings(len(tokenizer) + 3, mean_resizing=False)  # a padded vocabulary
    base.save_pretrained(tmp_path / "base")
    rows = base.get_input_embeddings().weight.shape[0]
    first, second = (tokenizer.convert_tokens_to_ids(reserved[i : i + 2]) for i in (2, 4))

    conf = MoteConfig(r=2, experts=("think", "say"), markers={"think": first, "say": second}, init_weights=False)
    model = get_peft_model(base, conf).eval()
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == rows
    ids = tokenizer(f"how{reserved[2]}safe{reserved[3]}{reserved[4]}answer", return_tensors="pt")["input_ids"]
    assert sorted(set(step_ids(ids, conf.routing)[0].tolist())) == [0, 1, 2]
    model(input_ids=ids, labels=ids).loss.backward()
    deltas = [p for name, p in model.named_parameters() if "trainable_tokens" in name]
    assert [delta.shape[0] for delta in deltas] == [4] * (1 if tied else 2)
    for delta in deltas:
        assert (delta.grad.abs().sum(1) > 0).any()
        delta.data.add_(0.5)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
        assert torch.equal(again.eval()(input_ids=ids).logits, before)


@pytest.mark.parametrize(("vocab_size", "rows"), [(None, 70), (66, 70), (70, 70), (80, 80)])
def test_embedding_grows_to_what_the_markers_need(vocab_size: int | None, rows: int) -> None:
    model = get_peft_model(base_model("llama tied"), adapter(vocab_size=vocab_size))
    assert model.get_input_embeddings().weight.shape[0] == rows


@pytest.mark.parametrize("family", ["llama tied", "llama untied", "gemma3", "gpt2"])
def test_a_further_adapter_trains_its_own_markers(family: str) -> None:
    base = base_model(family)
    ids = some_ids()
    base.resize_token_embeddings(76, mean_resizing=False)
    model = get_peft_model(base, adapter(family)).eval()
    before = model(input_ids=ids).logits
    model.add_adapter(
        "further", adapter(family, markers={name: [a + 6, b + 6] for name, (a, b) in MARKERS.items()}, vocab_size=None)
    )
    model.set_adapter("further")
    model(input_ids=ids + 6 * (ids > 63), labels=ids).loss.backward()
    rows = [p for name, p in model.named_parameters() if "trainable_tokens_delta.further" in name]
    assert len(rows) == (2 if family == "llama untied" else 1)
    for parameter in rows:
        assert parameter.grad.abs().sum() > 0
        parameter.data.add_(1)
    model.set_adapter("default")
    assert torch.equal(model(input_ids=ids).logits, before)


def test_a_further_adapter_that_needs_more_rows_is_refused() -> None:
    model = get_peft_model(base_model("llama tied"), adapter())
    more = adapter(markers={name: [a + 6, b + 6] for name, (a, b) in MARKERS.items()})
    with pytest.raises(ValueError, match=r"need 76 embedding rows.*resize_token_embeddings\(76\)"):
        model.add_adapter("further", more)
    assert list(model.peft_config) == ["default"]


def refused(model: Any, complaint: str, **changes: Any) -> None:
    """The adapter is refused, and the model is left as it was."""
    modules = dict(model.named_modules())
    rows = model.get_input_embeddings().weight.shape[0]
    with pytest.raises(ValueError, match=complaint):
        get_peft_model(model, adapter(**changes))
    assert dict(model.named_modules()) == modules and model.get_input_embeddings().weight.shape[0] == rows


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral"])
@pytest.mark.parametrize(
    "targets",
    ["all-linear", ["q_proj", "experts"], ["q_proj", "down_proj"], r".*\.(q_proj|experts)", r".*(q_proj|down_proj)"],
)
def test_fused_expert_weights_are_refused_by_name(family: str, targets: Any) -> None:
    fused = r"model\.layers\.0\.mlp\.experts\.\w+_proj \(\w+Experts\) holds fused 3-D expert weights.*'o_proj'"
    refused(base_model(family), fused, target_modules=targets)


def test_blocks_of_a_gate_are_refused_with_the_layers_to_name() -> None:
    model = tiny_model(tiny_config(transformers.RecurrentGemmaConfig()))
    gate = r"rg_lru\.\w+_gate_weight \(RecurrentGemmaRglru\) holds 3-D weights.*target_modules=\[.*'linear_x'.*'q_proj'"
    refused(model, gate, target_modules="all-linear")


def test_fused_expert_weights_can_be_left_out() -> None:
    model = get_peft_model(base_model("qwen3-moe"), adapter(exclude_modules=["experts"]))
    assert {name.split(".")[-1] for name in layers_of(model)} == set(ATTENTION)


class WQLinear_GEMM(nn.Module):
    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = like.in_features, like.out_features
        self.qweight = nn.Buffer(torch.zeros(like.in_features, like.out_features // 8, dtype=torch.int32))


class QuantLinear(nn.Module):
    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.infeatures, self.outfeatures = like.in_features, like.out_features


class VQuantLinear(WQLinear_GEMM):
    pass


class HQQLinear(WQLinear_GEMM):
    pass


def attention_output(like: nn.Linear) -> nn.Module:
    return nn.MultiheadAttention(like.in_features, 1).out_proj


@pytest.mark.parametrize("targets", ["all-linear", ATTENTION, r".*_proj"])
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        *((make, make.__name__) for make in (WQLinear_GEMM, QuantLinear, VQuantLinear, HQQLinear)),
        (lambda like: FP8Linear(like.in_features, like.out_features), "FP8Linear"),
        (attention_output, "NonDynamicallyQuantizableLinear"),
    ],
)
def test_other_layers_are_refused_by_class_and_name(
    make: Callable[[nn.Linear], nn.Module], kind: str, targets: Any
) -> None:
    model = base_model("llama tied")
    model.model.layers[1].self_attn.v_proj = make(model.model.layers[1].self_attn.v_proj)
    complaint = rf"layers\.1\.self_attn\.v_proj is a {kind}, which cannot hold step experts .* torch\.nn\.Linear, "
    refused(model, complaint, target_modules=targets)
    get_peft_model(model, adapter(target_modules=["mlp.up_proj"]))  # nothing is refused that is not asked for


@pytest.mark.parametrize("method", ["aqlm", "awq", "eetq", "fbgemm_fp8", "fp8", "gptq", "hqq", "mxfp4", "vptq"])
def test_ways_of_quantising_are_refused_by_name(method: str) -> None:
    for quantised in ({"quant_method": method}, SimpleNamespace(quant_method=method)):
        model = base_model("llama tied")
        model.config.quantization_config = quantised
        refused(model, f"quantization_config.quant_method='{method}'.*bitsandbytes")
    transformers.utils.quantization_config.QuantizationMethod(method)  # transformers calls it so


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"target_modules": ["q_proj", "w1"]}, "'w1' is the name of no layer"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head is the output head, whose marker rows"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens is a Embedding, which cannot hold"),
        ({"layers_to_transform": [1]}, r"layers_to_transform=\[1\].* target_modules='all-linear'"),
        ({"target_modules": r".*q_proj", "layers_to_transform": 0}, "layers_to_transform=0"),
    ],
)
def test_targets_without_effect_are_refused(changes: dict[str, Any], complaint: str) -> None:
    refused(base_model("llama tied"), complaint, **changes)


def test_data_parallel_is_refused_by_name() -> None:
    model = trained("llama tied").get_base_model()
    ids = some_ids()
    assert model(input_ids=ids).logits.isfinite().all()
    replica = model._replicate_for_data_parallel()  # what nn.DataParallel makes for each GPU
    with pytest.raises(RuntimeError, match=r"nn.DataParallel is not supported.*torchrun"):
        replica(input_ids=ids)
