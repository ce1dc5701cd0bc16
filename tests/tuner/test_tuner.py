"""Step experts against the paper's equation, PEFT's own LoRA and PEFT's life cycle."""

import copy
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PeftType, get_peft_model
from support.adapters import adapted, config, some_ids, tiny_llama
from support.reference import slow_layer
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

import mote
from mote.tokens.encode import add_markers
from mote.tokens.routing import step_ids
from mote.tuner import MoteConfig
from mote.tuner.layer import MoteLinear
from mote.tuner.registration import NAME, peft_type


@pytest.mark.parametrize("changes", [{}, {"mix": 1.0}, {"mix": 0.3}, {"question_expert": "guidance"}])
def test_layer_equals_the_equation(changes: dict[str, Any]) -> None:
    model = adapted(**changes)
    conf = model.peft_config["default"]
    layer = next(module for module in model.modules() if isinstance(module, MoteLinear))
    seen: dict[str, Tensor] = {}
    layer.register_forward_hook(lambda _, args, out: seen.update(x=args[0], out=out))
    ids = some_ids()
    model(input_ids=ids)
    expected = slow_layer(layer, conf, seen["x"], step_ids(ids, conf.routing))
    torch.testing.assert_close(seen["out"], expected, atol=1e-5, rtol=1e-5)


def test_one_expert_is_plain_lora() -> None:
    conf = MoteConfig(
        r=4, lora_alpha=8, experts=("response",), mix=1.0, markers={"response": [60, 61]}, vocab_size=64,
        trainable_token_indices=[60], init_weights=False,
    )  # fmt: skip
    ours = get_peft_model(tiny_llama(), conf).eval()
    theirs = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")).eval()
    state = ours.state_dict()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(state[name.replace("lora_", "mote_")])
    ids = some_ids().clamp_max(63)
    torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-6, rtol=0)


def test_untrained_adapter_changes_nothing() -> None:
    ids = some_ids()
    base = tiny_llama()
    before = base(input_ids=ids.clamp_max(63)).logits
    model = get_peft_model(base, config(init_weights=True)).eval()
    torch.testing.assert_close(model(input_ids=ids.clamp_max(63)).logits[..., :64], before, atol=0, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_is_exact_and_small(tied: bool, tmp_path: Path) -> None:
    model = adapted(tied)
    ids = some_ids()
    before = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    experts = sum(p.numel() for name, p in model.named_parameters() if "mote_" in name)
    rows = 6 * 32 * (1 if tied else 2)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < (experts + rows) * 4 + 12_000
    again = PeftModel.from_pretrained(tiny_llama(tied), tmp_path).eval()
    assert torch.equal(again(input_ids=ids).logits, before)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "MOTE"


def test_auto_model_and_load_adapter_read_it(tiny: Path, tmp_path: Path) -> None:
    conf = MoteConfig(r=4, init_weights=False)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    base = LlamaForCausalLM.from_pretrained(tiny)
    add_markers(tokenizer, conf, base)
    model = get_peft_model(base, conf).eval()
    ids = torch.tensor([tokenizer("how do I<|analysis|>safe<|/analysis|><|response|>answer")["input_ids"]])
    before = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(auto(input_ids=ids).logits, before)
    plain = LlamaForCausalLM.from_pretrained(tiny)
    plain.load_adapter(str(tmp_path))
    assert torch.equal(plain.eval()(input_ids=ids).logits, before)


@pytest.mark.parametrize("tied", [True, False])
def test_an_offloaded_model_computes_the_same(tied: bool) -> None:
    ids = some_ids()
    given = {"input_ids": ids, "max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        expected = adapted(tied)(input_ids=ids).logits
        text = adapted(tied).generate(**given)
        model = accelerate.cpu_offload(adapted(tied))
        assert all(parameter.is_meta for parameter in model.parameters())
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(model.generate(**given), text)


def test_disabling_several_adapters_and_deleting() -> None:
    model = adapted()
    ids = some_ids()
    first = model(input_ids=ids).logits
    with model.disable_adapter():
        off = model(input_ids=ids).logits
    assert (off - first).abs().max() > 0.1
    torch.manual_seed(3)
    model.add_adapter("second", config())
    model.set_adapter("second")
    second = model.eval()(input_ids=ids).logits
    assert (second - first).abs().max() > 0.1
    model.set_adapter("default")
    assert torch.equal(model(input_ids=ids).logits, first)
    model.delete_adapter("second")
    assert torch.equal(model(input_ids=ids).logits, first)
    unloaded = model.unload()
    assert not any(isinstance(module, MoteLinear) for module in unloaded.modules())


@pytest.mark.parametrize("names", [["second", "default", "default"], ["__base__", "default", "default"]], ids=str)
def test_an_adapter_per_row_is_refused_by_name(names: list[str]) -> None:
    model = adapted()
    ids = some_ids()
    model.add_adapter("second", config())
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"adapter_names=\[.*all rows of a call are read by the active adapter"):
            call(input_ids=ids, adapter_names=names)
    expected = model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids, adapter_names=["default"] * 3).logits, expected)


def test_merging_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="chosen per token"):
        adapted().merge_and_unload()


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"left_padded": True}])
def test_cached_generation_equals_uncached(how: dict[str, Any]) -> None:
    model = adapted()
    ids = some_ids()
    mask = torch.ones_like(ids)
    if how.pop("left_padded", False):
        ids[1, :4], mask[1, :4] = 0, 0
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 12, "do_sample": False, **how}
    cached = model.generate(**given)
    uncached = model.generate(**{**given, "use_cache": False, "cache_implementation": None})
    assert torch.equal(cached, uncached)


def test_no_token_is_computed_twice_at_a_switch() -> None:
    model = adapted()
    ids = some_ids()
    counted: list[int] = []
    decoder = model.get_base_model()
    decoder.register_forward_pre_hook(
        lambda _, __, kwargs: counted.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    out = model.generate(input_ids=ids, max_new_tokens=10, do_sample=False)
    assert sum(counted) == out.shape[1] - 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_checkpointed_forwards_share_one_backward(reentrant: bool) -> None:
    model = adapted().train()
    ids = some_ids()
    model.enable_input_require_grads()
    experts = torch.tensor([1, 2, 3])

    def gradients() -> Tensor:
        model.zero_grad()
        first = model(input_ids=ids, labels=ids, question_experts=experts).loss
        second = model(input_ids=ids.flip(0), labels=ids.flip(0), question_experts=experts).loss
        (first + 2 * second).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(), plain, atol=1e-6, rtol=0)


def test_threads_do_not_mix_their_steps() -> None:
    model = adapted()
    batches = [torch.roll(some_ids(), shift, dims=1) for shift in range(6)]
    with torch.no_grad():
        expected = [model(input_ids=ids).logits for ids in batches]
        found: dict[int, list[Tensor]] = {i: [] for i in range(6)}

        def work(i: int) -> None:
            with torch.no_grad():
                for _ in range(10):
                    found[i].append(model(input_ids=batches[i]).logits)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i in range(6):
        assert len(found[i]) == 10
        for logits in found[i]:
            torch.testing.assert_close(logits, expected[i], atol=1e-5, rtol=0)


def test_question_expert_is_drawn_in_training_only() -> None:
    model = adapted()
    ids = torch.randint(3, 60, (1, 8))
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    model.train()
    seen = {round(float(model(input_ids=ids).logits.detach().sum()), 3) for _ in range(30)}
    assert len(seen) == 3
    drawn = {
        round(float(model(input_ids=ids, question_experts=torch.tensor([i])).logits.detach().sum()), 3)
        for i in (1, 2, 3)
    }
    assert drawn == seen


def test_without_ids_the_call_fails_loudly() -> None:
    model = adapted()
    embeds = torch.randn(1, 4, 32)
    with pytest.raises(RuntimeError, match="step of each token is unknown"):
        model(inputs_embeds=embeds)
    steps = torch.tensor([[0, 1, 1, 2]])
    assert model(inputs_embeds=embeds, step_ids=steps).logits.shape == (1, 4, 70)


def test_a_copied_model_routes_by_itself() -> None:
    model = adapted()
    ids = some_ids()
    assert torch.equal(copy.deepcopy(model)(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"mix": -0.1}, "mix=-0.1"),
        ({"mix": 1.5}, "mix=1.5"),
        ({"r": 0}, "r=0"),
        ({"experts": ("a", "a")}, "each expert once"),
        ({"question_expert": "nobody"}, "question_expert='nobody'"),
        ({"experts": ("other",)}, "markers name the steps"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        config(**changes)


def test_registration_is_a_real_member() -> None:
    assert peft_type(NAME) is PeftType.MOTE is PeftType("MOTE") is PeftType["MOTE"]
    assert PeftType.MOTE.value == "MOTE" and PeftType.MOTE in list(PeftType)
    assert mote.MoteConfig is MoteConfig


def test_layers_are_chosen_as_in_lora() -> None:
    model = get_peft_model(tiny_llama(), config(target_modules=["q_proj", "down_proj"], layers_to_transform=[1]))
    names = [name for name, module in model.named_modules() if isinstance(module, MoteLinear)]
    assert [name.split("layers.")[1] for name in names] == ["1.self_attn.q_proj", "1.mlp.down_proj"]
    ranked = get_peft_model(tiny_llama(), config(rank_pattern={"q_proj": 2}))
    widths = {name.split(".")[-1]: m.mote_A["default"].weight.shape[0] for name, m in ranked.named_modules()
              if isinstance(m, MoteLinear)}  # fmt: skip
    assert widths["q_proj"] == 8 and widths["k_proj"] == 16
    assert ranked.eval()(input_ids=some_ids()).logits.isfinite().all()


def test_only_linear_layers_take_experts() -> None:
    with pytest.raises(ValueError, match="cannot hold step experts"):
        get_peft_model(tiny_llama(), config(target_modules=["input_layernorm"]))


@pytest.mark.parametrize(
    "program",
    [
        "import mote; import peft; peft.PeftType.MOTE",
        "import peft; import mote; peft.PeftType.MOTE",
        "import mote; from transformers.utils import is_peft_available as f; f(); import peft; peft.PeftType.MOTE",
        "import importlib.util as u; import mote; u.find_spec('peft'); u.find_spec('peft'); import peft; "
        "assert 'MOTE' in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING",
        "import mote.tokens.encode; import peft; peft.PeftType.MOTE",
        "import mote.models.embeddings; import peft; peft.PeftType.MOTE",
        "import mote, sys; assert not {'torch', 'peft', 'transformers'} & set(sys.modules)",
    ],
)
def test_import_mote_is_enough_and_brings_no_torch(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True)


def test_layers_of_every_rank_share_the_drawn_question_expert() -> None:
    model = adapted(rank_pattern={"q_proj": 2}, mix=1.0, experts=("analysis", "guidance", "response")).train()
    layers = [module for module in model.modules() if isinstance(module, MoteLinear)]
    router = layers[0].router
    chosen: list[set[int]] = []

    def look(*_: Any) -> None:
        weights = {rank: router.route("default", rank).weights[0, 0].view(3, rank)[:, 0] for rank in (2, 4)}
        chosen.append({int(weight.argmax()) for weight in weights.values()})

    layers[0].register_forward_pre_hook(look)
    for _ in range(20):
        model(input_ids=torch.randint(3, 60, (1, 5)))
    assert all(len(experts) == 1 for experts in chosen) and len(set.union(*chosen)) > 1


LORA_CHOICES: dict[str, dict[str, Any]] = {
    "all linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*layers\.1\..*(q_proj|up_proj)"},
    "one layer": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "one layer by its list": {"target_modules": ["v_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "without names": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "up_proj"]},
    "without a regex": {"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*layers\.0\..*"},
    "ranks by name": {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2, "down_proj": 8}},
    "ranks by regex": {"target_modules": "all-linear", "rank_pattern": {r"layers\.1\.mlp\..*": 2, "q_proj": 8}},
    "rank-stabilised": {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"v_proj": 16}},
    "dropout": {"target_modules": "all-linear", "lora_dropout": 0.4},
}


def both_loras(choice: dict[str, Any], **weights: Any) -> tuple[Any, Any]:
    """The same LoRA by one step expert and by PEFT, from the same seed."""
    ours = MoteConfig(
        r=4, lora_alpha=8, experts=("response",), mix=1.0, markers={"response": [60, 61]}, draw_question_expert=False,
        init_weights=weights.get("ours", True), **choice,
    )  # fmt: skip
    theirs = LoraConfig(r=4, lora_alpha=8, init_lora_weights=weights.get("theirs", True), **choice)
    models = []
    for conf in (ours, theirs):
        base = tiny_llama().double()
        torch.manual_seed(5)
        models.append(get_peft_model(base, conf).eval())
    return models[0], models[1]


@pytest.mark.parametrize("choice", LORA_CHOICES.values(), ids=LORA_CHOICES)
def test_choices_of_layers_and_ranks_are_those_of_lora(choice: dict[str, Any]) -> None:
    ours, theirs = both_loras(choice, ours=False, theirs=False)
    state = ours.state_dict()
    copied = 0
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(state[name.replace("lora_", "mote_")])
            copied += 1
    assert copied == len([name for name in state if "mote_" in name]) > 0
    ids = some_ids().clamp_max(63)
    logits = ours(input_ids=ids).logits
    torch.testing.assert_close(logits, theirs(input_ids=ids).logits, atol=1e-9, rtol=0)
    drawn = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(6)
        drawn.append(model(input_ids=ids).logits)
    torch.testing.assert_close(*drawn, atol=1e-9, rtol=0)
    dropped = float((drawn[0] - logits).abs().max().detach())
    assert dropped > 0.01 if "lora_dropout" in choice else dropped < 1e-9


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_weights_begin_as_those_of_lora(init: Any) -> None:
    ours, theirs = both_loras({"target_modules": "all-linear"}, ours=init, theirs=init)
    state = ours.state_dict()
    loras = {name: parameter for name, parameter in theirs.named_parameters() if "lora_" in name}
    for name, parameter in loras.items():
        assert torch.equal(state[name.replace("lora_", "mote_")], parameter)
        assert ("lora_B" in name) == (parameter.abs().sum() == 0)
