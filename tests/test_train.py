"""Training on the tiny model: what a batch holds, what the held-out loss is, and what a recipe may say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mote
from mote.config import Recipe
from mote.errors import UserError
from mote.models import load_base
from mote.records import ChainRow
from mote.steps import load_scheme
from mote.tokens import IGNORED, Tokens, add_markers, encode_chain
from mote.train import ChainDataset, collate, last_whole_checkpoint, mote_config, split_rows, train, training_arguments

SCHEME = load_scheme("safety")
TEXTS = {"analysis": "is it safe", "guidance": "answer how", "response": "kill a process on my computer"}


def chains(count: int = 8) -> list[ChainRow]:
    depths = list(SCHEME.depths.values())
    return [
        ChainRow.model_validate(
            {
                "id": str(i), "messages": [{"role": "user", "content": f"how do I answer {i}"}], "checks": [],
                "steps": [{"name": name, "text": f"{TEXTS[name]} {i}"} for name in depths[i % 3]], "safe": i != 5,
                "rejected": "response: empty" if i == 6 else None, "model": "m", "prompts": "p", "seed": 0,
                "tokens": {"made": 1, "kept": 1}, "seconds": 0.0,
            }
        )
        for i in range(count)
    ]  # fmt: skip


def recipe(tiny: Path, **train_changes: Any) -> Recipe:
    settings = {
        "learning_rate": 3e-3, "num_train_epochs": 2, "per_device_train_batch_size": 2, "save_steps": 2,
        "held_out": 0.2, **train_changes,
    }  # fmt: skip
    return Recipe.model_validate(
        {"model": str(tiny), "device": "cpu", "experts": {"r": 4, "lora_alpha": 8}, "train": settings}
    )


def tokens(ids: list[int], steps: list[int]) -> Tokens:
    return Tokens(ids=ids, labels=[IGNORED, *ids[1:]], steps=steps)


def test_a_batch_is_padded_and_masked() -> None:
    rows = [tokens([5, 6, 7, 8], [0, 0, 1, 3]), tokens([5, 6], [0, 3])]
    batch = collate([ChainDataset(rows, 3, 0.0, 0)[i] for i in range(2)], pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 6, 9, 9]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, 8], [IGNORED, 6, IGNORED, IGNORED]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert batch["step_ids"].tolist() == [[0, 0, 1, 3], [0, 3, 0, 0]]
    assert batch["attention_mask"].shape == (2, 1, 4, 4)
    assert batch["attention_mask"][1, 0].tolist() == [
        [True, False, False, False], [True, True, False, False], [True, True, True, False], [True, True, False, True]
    ]  # fmt: skip


def test_draws_change_with_the_epoch_and_are_the_same_again() -> None:
    data = ChainDataset([tokens([1, 2, 3, 4], [0, 1, 2, 3])] * 64, 3, 0.5, seed=1)

    def draws() -> list[Any]:
        return [(item["sight"].tolist(), item["question_expert"]) for item in (data[i] for i in range(64))]

    first = draws()
    assert draws() == first
    assert {expert for _, expert in first} == {1, 2, 3}
    data.set_epoch(1)
    assert draws() != first


def test_training_learns_keeps_the_base_and_says_what_it_did(tiny: Path, tmp_path: Path) -> None:
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
    _, held = split_rows(
        [encode_chain(model.tokenizer, chain, model.markers, model.config.experts) for chain in accepted], 0.2, 0
    )
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


def test_marker_rows_may_have_a_learning_rate_of_their_own(tiny: Path, tmp_path: Path) -> None:
    def moved(folder: str, **changes: Any) -> float:
        base = load_base(str(tiny), device="cpu")
        adapter = train(base, chains(), SCHEME, recipe(tiny, num_train_epochs=1, **changes), tmp_path / folder)
        rows = next(v for k, v in load_file(adapter / "adapter_model.safetensors").items() if "trainable_tokens" in k)
        fresh, config = load_base(str(tiny), device="cpu"), mote_config(recipe(tiny), SCHEME)
        add_markers(fresh.tokenizer, config, fresh.model)
        ids = sorted(id_ for pair in config.markers.values() for id_ in pair)
        return float((rows - fresh.model.get_input_embeddings().weight[ids].detach()).abs().max())

    assert moved("same") < 0.02 < moved("own", marker_learning_rate=0.1)


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    assert last_whole_checkpoint(tmp_path) is None
    for step in (2, 10, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-9" / "complete").touch()
    (tmp_path / "checkpoint-2" / "complete").touch()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-9"


def test_splits_are_fixed_and_leave_something_to_train_on() -> None:
    rows = [tokens([i, i], [0, 3]) for i in range(10)]
    kept, held = split_rows(rows, 0.3, 1)
    assert len(held) == 3 and {id(row) for row in kept + held} == {id(row) for row in rows}
    assert split_rows(rows, 0.3, 1) == (kept, held) != split_rows(rows, 0.3, 2)
    assert split_rows(rows[:1], 0.9, 0) == (rows[:1], [])


def test_nothing_to_train_on_is_said(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of the 2 chains can be trained on"):
        train(load_base(str(tiny), device="cpu"), chains(7)[5:], SCHEME, recipe(tiny), tmp_path)


def test_any_training_argument_may_be_set_and_others_are_named(tiny: Path, tmp_path: Path) -> None:
    arguments = training_arguments(recipe(tiny, weight_decay=0.1, lr_scheduler_type="cosine"), tmp_path)
    assert arguments.weight_decay == 0.1 and arguments.lr_scheduler_type == "cosine"
    with pytest.raises(UserError, match=r"unknown setting 'train\.learning_rat'"):
        training_arguments(recipe(tiny, learning_rat=1), tmp_path)
    with pytest.raises(UserError, match="recipe: train: "):
        training_arguments(recipe(tiny, eval_strategy="sometimes"), tmp_path)
    with pytest.raises(UserError, match=r"recipe: experts\.question_expert='nobody'"):
        mote_config(Recipe.model_validate({"experts": {"question_expert": "nobody"}}), SCHEME)
