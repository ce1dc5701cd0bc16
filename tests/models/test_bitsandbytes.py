"""Step experts on the 8-bit and 4-bit layers of bitsandbytes, on the CPU."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from mote.tokens.routing import step_ids
from mote.tuner import MoteConfig
from mote.tuner.experts import plain
from mote.tuner.layer import MoteLinear

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes has no wheel for this system")

MARKERS = {"analysis": [64, 65], "guidance": [66, 67], "response": [68, 69]}
KINDS = {
    "8-bit": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "nf4 twice": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32,
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.float32},
}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(  # sizes that the packed 4-bit product of newer CPUs can take: multiples of 32
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False, initializer_range=0.2, pad_token_id=0, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    where = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(where)
    return where


def quantised(folder: Path, kind: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**KINDS[kind]), dtype=torch.float32, device_map="cpu"
    ).eval()


def adapter(**changes: Any) -> MoteConfig:
    given: dict[str, Any] = {"r": 2, "lora_alpha": 4, "markers": MARKERS, "turn_ids": [2], "vocab_size": 70}
    return MoteConfig(**{**given, "draw_question_expert": False, **changes})


def some_ids() -> Tensor:
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(2))
    ids[0, 3], ids[0, 6], ids[0, 9], ids[1, 5] = 64, 66, 68, 66
    return ids


def dequantised(layer: Any) -> Tensor:
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return layer.weight.data.float() * layer.weight.SCB[:, None] / 127
    weight: Tensor = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight.float()


@every_kind
def test_gradients_pass_through_quantised_layers(folder: Path, kind: str) -> None:
    base = prepare_model_for_kbit_training(quantised(folder, kind))
    model = get_peft_model(base, adapter()).train()
    ids = some_ids()
    assert model.is_gradient_checkpointing
    layers = [module for module in model.modules() if isinstance(module, MoteLinear)]
    assert len(layers) == 14 and all(type(layer.base_layer).__module__.startswith("bitsandbytes") for layer in layers)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.3
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@every_kind
def test_checkpointed_gradients_are_the_plain_ones(folder: Path, kind: str) -> None:
    model = get_peft_model(quantised(folder, kind), adapter(init_weights=False)).train()
    ids = some_ids()
    model.enable_input_require_grads()

    def gradients() -> Tensor:
        model.zero_grad()
        first = model(input_ids=ids, labels=ids).loss
        second = model(input_ids=ids.flip(1), labels=ids.flip(1)).loss
        (first + 2 * second).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    expected = gradients()
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(), expected, atol=1e-6, rtol=1e-5)


@every_kind
def test_gradients_equal_those_of_the_dequantised_product(folder: Path, kind: str) -> None:
    model = get_peft_model(quantised(folder, kind), adapter(init_weights=False)).train()
    ids = some_ids()
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    weight = dequantised(layer.base_layer)
    a = layer.mote_A["default"].weight
    b = layer.mote_B["default"].weight
    x = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    out_grad = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(4))
    found: list[Tensor] = []
    gates: list[Tensor] = []

    def look(module: Any, *_: Any) -> None:
        if not found:
            found.append(torch.zeros(0))  # the layer is called again below
            gates.append(layer.router.route("default", 2).weights)
            out = layer(x)
            found[:] = [out, *torch.autograd.grad(out, [x, a, b], out_grad)]

    layer.register_forward_pre_hook(look)
    model(input_ids=ids)
    assert len(set(step_ids(ids, adapter().routing).flatten().tolist())) == 4
    out = plain(x, x @ weight.t(), a, b, gates[0])
    expected = [out, *torch.autograd.grad(out, [x, a, b], out_grad)]
    # The 8-bit layer rounds its input as well, by up to 1/254 of a row's largest value.
    close: Callable[..., None] = torch.testing.assert_close
    close(found[0], expected[0], **({"atol": 0.2, "rtol": 0} if kind == "8-bit" else {"atol": 1e-4, "rtol": 1e-4}))
    for mine, reference in zip(found[1:], expected[1:], strict=True):
        close(mine, reference, atol=1e-2 if kind == "8-bit" else 1e-4, rtol=1e-3)


@every_kind
def test_round_trip_is_exact_and_small(folder: Path, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = get_peft_model(quantised(folder, kind), adapter(init_weights=False)).eval()
    ids = some_ids()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        before = model(input_ids=ids).logits
        model.save_pretrained(tmp_path)
        assert (tmp_path / "adapter_model.safetensors").stat().st_size < 80_000
        again = PeftModel.from_pretrained(quantised(folder, kind), tmp_path).eval()
        assert torch.equal(again(input_ids=ids).logits, before)
        with model.disable_adapter():
            assert (model(input_ids=ids).logits - before).abs().max() > 0.1


@every_kind
def test_untrained_adapter_changes_nothing(folder: Path, kind: str) -> None:
    base = quantised(folder, kind)
    ids = some_ids().clamp_max(63)
    with torch.no_grad():
        before = base(input_ids=ids).logits
        assert torch.equal(get_peft_model(base, adapter()).eval()(input_ids=ids).logits[..., :64], before)


def test_imports_show_no_lines_of_other_libraries() -> None:
    """On some CPUs bitsandbytes, which PEFT imports, warns about a kernel that users can do nothing about."""
    code = "import mote, peft, bitsandbytes; import logging; logging.getLogger('bitsandbytes').warning('another line')"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.splitlines() == ["another line"]  # other warnings of bitsandbytes are still shown
