"""Bases that keep a state: what would leak is refused before training, and plain training is exact."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.adapters import MARKERS
from support.bases import HYBRID_TARGETS, make_hybrid_model
from support.training import SCHEME, chains, recipe
from transformers import AutoModelForCausalLM, DogeConfig, LlamaConfig

import mote
from mote.core.errors import UserError
from mote.core.recipe import Recipe
from mote.experiments.run import Run
from mote.models.capabilities import capabilities_of
from mote.models.load import load_base
from mote.tokens.encode import IGNORED, encode_chain
from mote.train import train
from mote.train.arguments import check_base, check_row_length
from mote.train.examples import split_groups
from mote.tuner import MoteConfig


@pytest.fixture(scope="module")
def hybrid(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hybrid_model(tiny, tmp_path_factory.mktemp("hybrid"))


def of_hybrid(hybrid: Path, **changes: Any) -> Recipe:
    given = recipe(hybrid, **{"skip_p": 0.0, **changes})
    experts = given.experts.model_copy(update={"target_modules": HYBRID_TARGETS})
    return given.model_copy(update={"experts": experts})


@pytest.mark.parametrize(
    ("changes", "setting", "remedy"),
    [
        ({"skip_p": 0.2}, "train.skip_p=0.2", "train.method=mote-built"),
        ({"skip_pairs": {"response": {"analysis": 0.5}}}, "train.skip_pairs", "train.skip_p=0"),
        ({"packing": True}, "train.packing=true", "train.packing=false"),
        ({"skip_p": 0.2, "skip_views": 2}, "train.skip_p=0.2", "train.skip_p=0"),
        ({"attention": "flex_attention"}, "train.attention=flex_attention", "use sdpa"),
    ],
)
def test_setting_that_would_leak_is_refused_by_name(
    hybrid: Path, tmp_path: Path, changes: dict[str, Any], setting: str, remedy: str
) -> None:
    with pytest.raises(UserError) as error:
        train(load_base(str(hybrid), device="cpu"), chains(), SCHEME, of_hybrid(hybrid, **changes), tmp_path)
    line = str(error.value)
    assert setting in line and remedy in line and "\n" not in line
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["mote", "mote-built"])
def test_held_out_loss_of_a_hybrid_equals_a_plain_loop(hybrid: Path, tmp_path: Path, method: str) -> None:
    changes = {"method": method, "skip_p": 0.2 if method == "mote-built" else 0.0, "num_train_epochs": 1}
    adapter = train(load_base(str(hybrid), device="cpu"), chains(24), SCHEME, of_hybrid(hybrid, **changes), tmp_path)
    last = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if "eval" in line][-1]
    model = mote.load(str(hybrid), adapter, device="cpu")
    accepted = [chain for chain in chains(24) if chain.accepted]
    rows = [encode_chain(model.tokenizer, chain, model.markers, model.config.experts) for chain in accepted]
    _, held = split_groups([[row] for row in rows], 0.2, 0)
    losses = []
    for row in held:
        with torch.no_grad():
            logits = model.model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0].log_softmax(-1)
        losses += [-float(logits[t - 1, id_]) for t, id_ in enumerate(row.labels) if t and id_ != IGNORED]
    assert len({len(row.ids) for row in held}) > 1  # rows are padded
    if method == "mote":
        assert last["eval_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert model.answer("how do I answer", "full", max_step_tokens=4).answer


def test_run_is_refused_before_a_chain_is_made(hybrid: Path, tmp_path: Path) -> None:
    given = recipe(hybrid, skip_p=0.2).model_copy(update={"limit": 2})
    with pytest.raises(UserError, match=r"train.skip_p=0.2: granitemoehybrid has layers that keep a state"):
        Run(given, tmp_path).all()
    assert not any(tmp_path.iterdir())


def test_layer_that_a_fused_kernel_reads_is_refused(hybrid: Path, tmp_path: Path) -> None:
    given = recipe(hybrid, skip_p=0.0)  # all linear layers
    refused = r"mamba\.out_proj .* reads its weight directly.*target_modules=\[.*'in_proj'.*'q_proj'"
    with pytest.raises(UserError, match=refused):
        train(load_base(str(hybrid), device="cpu"), chains(), SCHEME, given, tmp_path)


def test_longer_rows_than_the_attention_allows_are_refused(tiny: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny), device="cpu")
    base.model.config.keep_window_size = 16
    with pytest.raises(
        UserError, match=r"train.max_length=2048: in a row of more than 16 tokens .*; use at most 16, or"
    ):
        train(base, chains(), SCHEME, recipe(tiny, max_length=2048), tmp_path)
    assert not any(tmp_path.iterdir())


def test_packed_rows_that_are_too_long_are_refused_first(tiny: Path, tmp_path: Path) -> None:
    LlamaConfig(num_hidden_layers=2, keep_window_size=1024).save_pretrained(tmp_path / "base")
    given = recipe(tmp_path / "base", packing=True, max_length=2048).model_copy(update={"limit": 2})
    with pytest.raises(UserError, match=r"train.max_length=2048: in a row of more than 1024 tokens"):
        Run(given, tmp_path / "run").all()
    assert not any((tmp_path / "run").glob("*"))


@pytest.mark.parametrize("changes", [{"skip_p": 0.2}, {"skip_p": 0.0, "packing": False}])
def test_shorter_or_plain_rows_are_trained(changes: dict[str, Any]) -> None:
    given = recipe(Path("base"), max_length=2048, **changes)
    base = capabilities_of(DogeConfig(keep_window_size=1024))
    check_base(given, base)
    check_row_length(given, base, 1024 if given.train.skip_p else 2048)


def test_packed_row_of_a_peft_model_is_refused(hybrid: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(hybrid)
    model = get_peft_model(model, MoteConfig(r=2, target_modules=["q_proj"], markers=MARKERS, vocab_size=500)).eval()
    ids = torch.arange(3, 15)[None]
    positions = torch.tensor([[*range(5), *range(7)]])
    with pytest.raises(ValueError, match=r"granitemoehybrid keep a state \(linear_attention\).* its own row"):
        model(input_ids=ids, position_ids=positions, use_cache=False)
    padded = torch.tensor([[0] * 9 + [-1] * 3])
    with torch.no_grad():
        found = model(input_ids=ids, document_ids=padded, attention_mask=(padded + 1), use_cache=False).logits[:, :9]
        expected = model(input_ids=ids[:, :9], use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
