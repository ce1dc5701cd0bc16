"""Training of base models with sliding windows or chunks that are shorter than the chains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import chains, rows_of, trained
from support.windows import REACH, save_base, tiny_base

import mote
from mote.core.errors import UserError
from mote.core.recipe import Recipe
from mote.tokens.encode import IGNORED, encode_chain
from mote.train.examples import split_groups
from mote.train.stage import _mask_builder

NAMES = ("gemma2", "llama4", "mistral")


@pytest.mark.parametrize("name", NAMES)
def test_held_out_loss_is_that_of_the_models_own_masks(name: str, tiny: Path, tmp_path: Path) -> None:
    base = save_base(name, tiny, tmp_path / "base")
    trained(base, tmp_path / "run", num_train_epochs=2, per_device_train_batch_size=2)
    [*_, last] = rows_of(tmp_path / "run", "eval_loss")
    model = mote.load(str(base), tmp_path / "run" / "adapter", device="cpu")
    rows = [encode_chain(model.tokenizer, c, model.markers, model.config.experts) for c in chains(12) if c.accepted]
    _, held = split_groups([[row] for row in rows], 0.2, 0)
    model.base.model.set_attn_implementation("eager")
    losses = []
    for row in held:
        assert len(row.ids) > 3 * REACH
        with torch.no_grad():
            logits = model.model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0].log_softmax(-1)
        losses += [-float(logits[t - 1, row.ids[t]]) for t in range(1, len(row.ids)) if row.labels[t] != IGNORED]
    assert last["eval_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_packing_a_windowed_base_keeps_the_update(name: str, tiny: Path, tmp_path: Path) -> None:
    base = save_base(name, tiny, tmp_path / "base")
    arms: dict[str, dict[str, Any]] = {"single": {}, "packed": {"packing": True, "max_length": 256}}
    single, packed = (rows_of(trained(base, tmp_path / arm, **changes), "loss")[0] for arm, changes in arms.items())
    assert packed["loss"] == pytest.approx(single["loss"], abs=1e-5)
    assert packed["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-4)


def test_rows_that_llama_4_scales_by_index_are_refused(tiny: Path, tmp_path: Path) -> None:
    base = save_base("llama4", tiny, tmp_path / "base", floor_scale=80)
    with pytest.raises(
        UserError, match=r"train\.max_length=128: in a row of more than 79 tokens .* use at most 79, or train\.pack"
    ):
        trained(base, tmp_path / "run", packing=True, max_length=128)


def test_flex_attention_of_doge_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mote.train.stage.uses_flex_attention", lambda recipe, device: True)
    with pytest.raises(UserError, match=r"attention=flex_attention: DogeForCausalLM drops its mask, .*; use sdpa"):
        _mask_builder(tiny_base("doge"), Recipe(), False)
