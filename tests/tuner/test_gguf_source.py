"""What GGUF files are made of: weights on disk equal those of the loaded model with its adapter."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exports import make_adapter
from support.tiny import make_tiny_model
from transformers import AutoModelForCausalLM

import mote
from mote.core.errors import MoteError, UserError
from mote.inference.load import read_adapter
from mote.models.load import fingerprint, load_base
from mote.tuner.gguf.file import Entry, encoded, stored_type
from mote.tuner.gguf.source import EMBEDDING, HEAD, BaseWeights, Experts, matrix, vocabulary_rows


@pytest.mark.parametrize("tied", [True, False])
def test_base_on_disk_has_the_loaded_models_weights(tied: bool, tmp_path: Path) -> None:
    folder = str(make_tiny_model(tmp_path / "base", tied=tied))
    base = BaseWeights(folder)
    model = load_base(folder, "cpu", "float32").model
    assert base.tied == tied
    assert list(base.parameters) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(base.read(name), parameter.data, rtol=0, atol=0)
    assert base.fingerprint() == fingerprint(model)


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_have_the_rows_that_loading_makes(tied: bool, tmp_path: Path) -> None:
    """The trained marker rows, and those of other tokens that the base has no rows for."""
    folder = make_tiny_model(tmp_path / "base", tied=tied)
    small = AutoModelForCausalLM.from_pretrained(folder)
    small.resize_token_embeddings(290)
    small.save_pretrained(folder)
    adapter = make_adapter(folder, tmp_path / "adapter")
    base = BaseWeights(str(folder))
    experts = Experts(read_adapter(adapter), base)
    model = mote.load(str(folder), adapter, device="cpu", dtype="float32").model
    rows = vocabulary_rows(base, experts)
    for name, layer in ((EMBEDDING, model.get_input_embeddings()), (HEAD, model.get_output_embeddings())):
        expected = layer.weight.data.clone()
        assert len(expected) == rows
        if name == HEAD and tied:
            continue
        ids, trained = experts.rows(name) or ([], torch.empty(0))
        assert len(ids) == 6
        expected[ids] = trained
        torch.testing.assert_close(matrix(base, experts, name, rows), expected, rtol=0, atol=0)


def test_files_without_the_models_weights_are_refused(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "base"))
    (folder / "model.safetensors").rename(folder / "model.bin")
    with pytest.raises(UserError, match="no safetensors files"):
        BaseWeights(str(folder))
    other = make_tiny_model(tmp_path / "other", tied=False)
    shutil.copy(tiny / "model.safetensors", other / "model.safetensors")
    with pytest.raises(UserError, match=r"lack lm_head\.weight"):
        BaseWeights(str(other))


def test_weights_of_a_hub_id_are_fetched_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def download(name: str, **more: Any) -> str:
        asked.append({"name": name, **more})
        return str(tiny)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert mote.models.load.weights_folder("owner/model", "main") == tiny
    assert asked[0]["name"] == "owner/model" and asked[0]["revision"] == "main"


def test_values_that_a_type_cannot_hold_are_an_error() -> None:
    entry = Entry("blk.0.attn_q.weight", (1, 32), "f16", lambda: torch.full((1, 32), 1e6))
    with pytest.raises(MoteError, match="use --quantise f32"):
        encoded(entry)


def test_rows_without_whole_blocks_are_stored_as_f16() -> None:
    assert stored_type("q8_0", (4, 33)) == "f16"
    assert stored_type("q8_0", (4, 64)) == "q8_0"
    assert stored_type("q8_0", (64,)) == "f32"
