"""Training the tiny model: batches, held-out loss, checkpoints and settings."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.training import SCHEME, chains, recipe, rows_of, trained, weights_of

import mote
from mote.core.errors import UserError
from mote.core.recipe import Recipe
from mote.models.load import load_base
from mote.tokens.encode import IGNORED, Tokens, add_markers, encode_chain
from mote.tokens.packing import ChainDataset
from mote.train import (
    MoteTrainer,
    check_settings,
    last_whole_checkpoint,
    mote_config,
    train,
    training_arguments,
)
from mote.train.examples import split_groups


def tokens(ids: list[int], steps: list[int]) -> Tokens:
    return Tokens(ids=ids, labels=[IGNORED, *ids[1:]], steps=steps)


def test_training_reduces_loss_and_keeps_base_weights(tiny: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny), device="cpu")
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    adapter = train(base, chains(24), SCHEME, recipe(tiny, num_train_epochs=6), tmp_path)
    after = dict(base.model.named_parameters())
    for name, weight in before.items():
        kept = [other for key, other in after.items() if key.replace(".base_layer", "") == name]
        assert not kept or torch.equal(kept[0][: weight.shape[0]], weight), name
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    held = [row for row in rows if "eval_loss" in row]
    assert held[-1]["eval_loss"] < held[0]["eval_loss"] - 0.3
    assert {"eval_loss_analysis", "eval_loss_guidance", "eval_loss_response", "eval_loss_markers"} <= set(held[0])
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == list(range(1, len(trained) + 1))
    assert all(row["tokens_per_second"] > 0 and row["peak_memory_mb"] > 0 for row in trained)
    assert not (tmp_path / "checkpoints").exists()
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["peft_type"] == "MOTE" and config["base_model_name_or_path"] == str(tiny)
    assert mote.load(str(tiny), adapter, device="cpu").answer("how do I answer", max_step_tokens=4).answer
    assert not list(adapter.glob("*.bin")) and not list(adapter.glob("*.pt"))


def test_held_out_loss_equals_a_plain_loop(tiny: Path, tmp_path: Path) -> None:
    adapter = train(load_base(str(tiny), device="cpu"), chains(24), SCHEME, recipe(tiny), tmp_path)
    last = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if "eval" in line][-1]
    model = mote.load(str(tiny), adapter, device="cpu")
    accepted = [chain for chain in chains(24) if chain.accepted]
    rows = [encode_chain(model.tokenizer, chain, model.markers, model.config.experts) for chain in accepted]
    _, held = split_groups([[row] for row in rows], 0.2, 0)
    losses: dict[str, list[float]] = {}
    for row in held:
        with torch.no_grad():
            logits = model.model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        for t in range(1, len(row.ids)):
            if row.labels[t] == IGNORED:
                continue
            marker = row.ids[t] in model.markers.starts + model.markers.ends
            name = "markers" if marker else model.config.experts[row.steps[t] - 1]
            for group in (name, "all"):
                losses.setdefault(group, []).append(-float(logits[t - 1, row.ids[t]]))
    for group, values in losses.items():
        key = "eval_loss" if group == "all" else f"eval_loss_{group}"
        assert last[key] == pytest.approx(sum(values) / len(values), abs=1e-4), group


def test_marker_rows_take_a_separate_learning_rate(tiny: Path, tmp_path: Path) -> None:
    def moved(folder: str, **changes: Any) -> float:
        base = load_base(str(tiny), device="cpu")
        adapter = train(base, chains(), SCHEME, recipe(tiny, num_train_epochs=1, **changes), tmp_path / folder)
        rows = next(v for k, v in load_file(adapter / "adapter_model.safetensors").items() if "trainable_tokens" in k)
        fresh = load_base(str(tiny), device="cpu")
        config = mote_config(recipe(tiny), SCHEME)
        add_markers(fresh.tokenizer, config, fresh.model)
        ids = sorted(id_ for pair in config.markers.values() for id_ in pair)
        return float((rows - fresh.model.get_input_embeddings().weight[ids].detach()).abs().max())

    assert moved("same") < 0.02 < moved("own", marker_learning_rate=0.1)


@pytest.mark.parametrize("draws", [1, 2])
def test_packing_does_not_change_the_update(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draws: int
) -> None:
    """One update from the same chains and draws: loss, gradient, tokens and held-out losses are unchanged."""
    made: list[MoteTrainer] = []

    class Kept(MoteTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr("mote.train.stage.MoteTrainer", Kept)
    single = trained(tiny, tmp_path / "single", skip_views=draws)
    packed = trained(tiny, tmp_path / "packed", packing=True, max_length=256, skip_views=draws)
    assert len(made[1].train_dataset) < len(made[0].train_dataset) / (3 if draws == 1 else 2)  # type: ignore[arg-type]
    assert made[0].tokens_seen == made[1].tokens_seen == sum(len(row.ids) for row in made[0].train_dataset.chains)  # type: ignore[union-attr]
    [before] = rows_of(single, "loss")
    [after] = rows_of(packed, "loss")
    assert after["loss"] == pytest.approx(before["loss"], abs=1e-5)
    assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-4)
    [before] = rows_of(single, "eval_loss")
    [after] = rows_of(packed, "eval_loss")
    for name, value in before.items():
        assert after[name] == pytest.approx(value, abs=1e-3), name

    rows: Any = made[0].train_dataset
    none = torch.zeros_like(rows.probabilities_S_S)
    wanted = made[0].evaluate(ChainDataset(rows.chains, none, 0))
    found = made[0].evaluate(ChainDataset(rows.chains, none, 0, row_length=256))
    assert found == pytest.approx(wanted, abs=1e-5)


def test_interrupted_packed_training_resumes_exactly(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {
        "packing": True, "max_length": 64, "num_train_epochs": 4, "save_steps": 1, "per_device_train_batch_size": 2,
        "step_weights": {"analysis": 0.5}, "skip_views": 2,
    }  # fmt: skip
    whole = trained(tiny, tmp_path / "whole", **changes)
    total = rows_of(whole, "loss")[-1]["step"]
    assert total > 6
    step = MoteTrainer.training_step

    def cut(trainer: MoteTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if trainer.state.global_step == total // 2:
            raise KeyboardInterrupt
        return step(trainer, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MoteTrainer, "training_step", cut)
        trained(tiny, tmp_path / "cut", **changes)
    assert last_whole_checkpoint(tmp_path / "cut" / "checkpoints") is not None
    again = trained(tiny, tmp_path / "cut", **changes)
    assert [row["loss"] for row in rows_of(again, "loss")] == [row["loss"] for row in rows_of(whole, "loss")]
    for name, weight in weights_of(whole).items():
        assert torch.equal(weights_of(again)[name], weight), name


@pytest.mark.parametrize(
    "given",
    [{"analysis": 0, "guidance": 0, "response": 1}, {"analysis": 0.5, "guidance": 0, "response": 2}],
    ids=["response only", "weights"],
)
def test_step_weights_scale_the_loss(tiny: Path, tmp_path: Path, given: dict[str, float]) -> None:
    """The logged loss is sum(weight * cross-entropy) / sum(weight) over all tokens of an update."""
    base = load_base(str(tiny), device="cpu")
    settings = recipe(tiny)
    config = mote_config(settings, SCHEME)
    add_markers(base.tokenizer, config, base.model)
    accepted = [chain for chain in chains(12) if chain.accepted]
    total = count = 0.0
    for chain in accepted:
        assert config.routing is not None
        row = encode_chain(base.tokenizer, chain, config.routing, config.experts)
        with torch.no_grad():  # experts begin at zero
            logits = base.model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        for t, label in enumerate(row.labels):
            if label != IGNORED:
                weight = given[config.experts[row.steps[t] - 1]]
                total = total - weight * float(logits[t - 1, label])
                count = count + weight
    changes = {"step_weights": given, "held_out": 0, "skip_p": 0, "learning_rate": 1e-9}
    wholly = trained(tiny, tmp_path / "wholly", **changes)
    assert rows_of(wholly, "loss")[0]["loss"] == pytest.approx(total / count, abs=1e-5)
    parts = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 8}
    in_parts = trained(tiny, tmp_path / "parts", **changes, **parts)
    [before] = rows_of(wholly, "loss")
    [after] = rows_of(in_parts, "loss")
    assert after["loss"] == pytest.approx(before["loss"], abs=1e-5)
    assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-4)
    plainly = trained(tiny, tmp_path / "plainly", **{**changes, "step_weights": {"analysis": 1}})
    assert rows_of(plainly, "loss")[0]["loss"] != pytest.approx(total / count, abs=1e-2)


def test_draws_lengthen_rows_and_keep_the_loss(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Experts start at zero; with a skip probability near 0 the second draw repeats the full chain."""
    changes = {"held_out": 0, "learning_rate": 1e-9, "skip_p": 1e-9, "step_weights": {"analysis": 0.5}}
    plain = trained(tiny, tmp_path / "plain", **changes)
    twice = trained(tiny, tmp_path / "twice", **changes, skip_views=2)
    [before] = rows_of(plain, "loss")
    [after] = rows_of(twice, "loss")
    assert after["loss"] == pytest.approx(before["loss"], abs=1e-5)
    assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-3)
    assert after["tokens"] > 1.2 * before["tokens"]
    capsys.readouterr()
    longest = {"max_length": 48}
    trained(tiny, tmp_path / "short", **changes, **longest)
    few = _left_out(capsys)
    trained(tiny, tmp_path / "shorter", **changes, **longest, skip_views=2)
    assert _left_out(capsys) > few


def _left_out(capsys: pytest.CaptureFixture[str]) -> int:
    found = re.search(
        r"(\d+) chains are longer(?: in train.skip_views=2 draws)? than train.max_length=48 and",
        capsys.readouterr().err,
    )
    return int(found[1]) if found else 0


def test_chains_with_zero_weight_are_left_out(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained(tiny, tmp_path, step_weights={"response": 0})  # three of the chains are a response alone
    assert "3 chains have only steps whose train.step_weights are 0 and are left out" in capsys.readouterr().err
    assert rows_of(folder, "loss")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"skip_pairs": {"analysis": {"response": 0.5}}}, r"train\.skip_pairs\.analysis\.response=0\.5: name a later"),
        ({"step_weights": {"answer": 1}}, r"train\.step_weights\.answer=1\.0: name one of analysis, guidance, resp"),
        ({"step_weights": {"response": -1}}, r"train\.step_weights\.response=-1\.0: a weight is 0 or above"),
        ({"step_weights": dict.fromkeys(SCHEME.steps, 0)}, "leave one step a weight above 0"),
        ({"step_weights": {"response": 2}, "label_smoothing_factor": 0.1}, r"train\.label_smoothing_factor=0\.1"),
        ({"skip_views": 2, "label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1: .* with train.skip_views=2"),
        ({"attention": "flex_attention"}, r"train\.attention=flex_attention: .* use sdpa"),
    ],
)
def test_invalid_training_settings_are_refused(tiny: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        check_settings(recipe(tiny, **changes), SCHEME, Path("runs"))


def test_incomplete_checkpoints_are_ignored(tmp_path: Path) -> None:
    assert last_whole_checkpoint(tmp_path) is None
    for step in (2, 10, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-9" / "complete").touch()
    (tmp_path / "checkpoint-2" / "complete").touch()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-9"


def test_splits_are_deterministic_and_leave_training_rows() -> None:
    groups = [[tokens([i, i], [0, 3]), tokens([i, i, i], [0, 1, 3])] for i in range(10)]
    kept, held = split_groups(groups, 0.3, 1)
    assert len(held) == 6 and {id(row) for row in kept + held} == {id(row) for group in groups for row in group}
    assert {row.ids[0] for row in held}.isdisjoint(row.ids[0] for row in kept)  # a chain is held out as a whole
    assert split_groups(groups, 0.3, 1) == (kept, held) != split_groups(groups, 0.3, 2)
    assert split_groups(groups[:1], 0.9, 0) == (groups[0], [])


def test_no_usable_chain_is_an_error(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of the 2 chains can be trained on"):
        train(load_base(str(tiny), device="cpu"), chains(7)[5:], SCHEME, recipe(tiny), tmp_path)


def test_training_arguments_pass_and_unknown_ones_are_named(tiny: Path, tmp_path: Path) -> None:
    arguments = training_arguments(recipe(tiny, weight_decay=0.1, lr_scheduler_type="cosine"), tmp_path)
    assert arguments.weight_decay == 0.1 and arguments.lr_scheduler_type == "cosine"
    with pytest.raises(UserError, match=r"unknown setting 'train\.learning_rat'"):
        training_arguments(recipe(tiny, learning_rat=1), tmp_path)
    with pytest.raises(UserError, match="recipe: train: "):
        training_arguments(recipe(tiny, eval_strategy="sometimes"), tmp_path)
    with pytest.raises(UserError, match=r"recipe: experts\.question_expert='nobody'"):
        mote_config(Recipe.model_validate({"experts": {"question_expert": "nobody"}}), SCHEME)
