"""Every training method: its rows, its equivalence to what it claims to be, and answers from its adapter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import load_peft_weights
from safetensors.torch import load_file
from support.adapters import save_random_adapter
from support.checked_chains import checked
from support.training import SCHEME, chains, recipe, rows_of, trained
from transformers import AutoModelForCausalLM

import mote
from mote.core.errors import UserError
from mote.core.methods import METHODS, apply_method, steps_of
from mote.core.records import ChainRow
from mote.core.scheme import CHECKED
from mote.models.load import load_base
from mote.models.shapes import ModelShape, count_trainable
from mote.serve.export import export_steps
from mote.tokens.encode import IGNORED, Tokens, add_markers
from mote.tokens.masks import Layout, sdpa_mask, skip_probabilities
from mote.tokens.packing import ChainDataset, collate
from mote.tokens.routing import NO_STEP
from mote.train import check_settings, mote_config
from mote.train.examples import groups_of
from mote.tuner.token_gated import TokenGatedConfig, gate_loss

FORCED = ["direct", "analysis", "full"]
MODES = {name: ["direct", "analysis", "full", "adaptive"] for name in METHODS} | {
    "separate": FORCED,
    "response-only": ["direct", "adaptive"],
}


def rows(tiny: Path, method: str, given: list[ChainRow], **changes: Any) -> tuple[list[Tokens], Any, Any]:
    """A method's rows, its model without zero weights, and its configuration."""
    settings = recipe(tiny, method=method, **changes)
    base = load_base(str(tiny), device="cpu")
    config = mote_config(settings, SCHEME)
    config.init_weights = False
    add_markers(base.tokenizer, config, base.model)
    steps = steps_of(settings, SCHEME)
    groups = groups_of(given, settings, SCHEME, steps, base.tokenizer, config.routing)
    torch.manual_seed(3)
    return [row for group in groups for row in group], get_peft_model(base.model, config), config


def batch_of(rows: list[Tokens], steps: tuple[str, ...]) -> dict[str, Any]:
    """Without skipping, and with the question read as at inference."""
    data = ChainDataset(rows, torch.zeros_like(skip_probabilities(0, {}, steps)), seed=0)
    batch = collate([data[i] for i in range(len(rows))], pad_id=0)
    batch.pop("question_experts")
    batch["attention_mask"] = sdpa_mask(Layout(batch["step_ids"], batch.pop("visibility"), batch["document_ids"]))
    return batch


def as_peft_lora(tiny: Path, model: Any, r: int, alpha: float, take: slice) -> Any:
    """PEFT's LoRA with the weights of one expert, on a base with the marker rows."""
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32, attn_implementation="sdpa")
    state = model.state_dict()
    embedding = next(v for k, v in state.items() if "embed_tokens" in k and k.endswith(".weight")).clone()
    ids = next(iter(model.peft_config.values())).trainable_token_indices
    embedding[ids] = next(v for k, v in state.items() if "trainable_tokens_delta" in k)
    base.resize_token_embeddings(len(embedding))
    base.get_input_embeddings().weight.data.copy_(embedding)
    theirs = get_peft_model(base, LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear"))
    for name, parameter in theirs.named_parameters():
        if "lora_A" in name:
            parameter.data.copy_(state[name.replace("lora_", "mote_")][take])
        elif "lora_B" in name:
            parameter.data.copy_(state[name.replace("lora_", "mote_")][:, take])
    return theirs


def assert_same_gradients(model: Any, theirs: Any, take: slice) -> int:
    ours = {name: p.grad for name, p in model.named_parameters() if "mote_" in name}
    compared = 0
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            found = ours[name.replace("lora_", "mote_")]
            found = found[take] if "lora_A" in name else found[:, take]
            torch.testing.assert_close(found, parameter.grad, atol=1e-6, rtol=1e-5)
            compared += 1
    return compared


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_answers_with_the_same_call(
    method: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mote.train import train

    settings = recipe(tiny, method=method, num_train_epochs=1, per_device_train_batch_size=8)
    adapter = train(load_base(str(tiny), device="cpu"), checked(), SCHEME, settings, tmp_path)
    first, *_ = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    weights = load_file(adapter / "adapter_model.safetensors")
    assert first["method"] == method
    assert first["trained_parameters"] == sum(weight.numel() for weight in weights.values())
    shape = ModelShape(layers=2, hidden=32, intermediate=64, heads=4, kv_heads=2, vocab=1, tied=True)
    planned = count_trainable(apply_method(settings, SCHEME), shape, len(steps_of(settings, SCHEME)))
    assert first["trained_parameters"] == planned
    assert f"{method} trains {first['trained_parameters']:,} parameters" in capsys.readouterr().err
    assert f"{first['trained_parameters']:,}" in (adapter / "README.md").read_text()
    assert all(row["eval_loss"] > 0 for row in rows_of(tmp_path, "eval_loss"))
    model = mote.load(str(tiny), adapter, device="cpu")
    questions = ["how do I answer", "how do I kill a process on my computer"]
    for mode in MODES[method]:
        for answer in model.answer(questions, mode, max_step_tokens=4):
            steps = tuple(step.name for step in answer.steps)
            assert steps in model.scheme.chains_of(mode) and answer.answer
            assert answer.tokens.total == sum(answer.tokens.steps.values()) <= 6 * len(steps)
    assert model.answer(questions[0], "base", max_step_tokens=4).answer
    if method == "four-experts":
        strict = model.answer(questions[0], CHECKED, max_step_tokens=4, check_threshold=1.0)
        assert strict.safe is False and strict.checks[-1].depth == "full" and 0 < strict.checks[-1].score < 1


def test_lora_method_equals_peft_lora(tiny: Path) -> None:
    """Same loss and gradients on the same chains to 1e-6, with the plain causal mask."""
    for method, r, alpha in (("lora", 4, 8), ("lora-x2", 8, 16)):
        given, model, config = rows(tiny, method, chains())
        batch = batch_of(given, config.experts)
        theirs = as_peft_lora(tiny, model, r, alpha, slice(None))
        ours = model.eval()(**batch).loss
        ours.backward()
        mask = (batch["document_ids"] >= 0).long()
        expected = theirs.eval()(input_ids=batch["input_ids"], attention_mask=mask, labels=batch["labels"]).loss
        expected.backward()
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)
        assert assert_same_gradients(model, theirs, slice(None)) == 2 * 2 * 7
        ids = torch.arange(3, 11)[None]
        with torch.no_grad(), model.disable_adapter():
            plain = model(input_ids=ids).logits
        with torch.no_grad():
            unread = model(input_ids=ids, step_ids=torch.full_like(ids, NO_STEP)).logits
            assert not torch.allclose(model(input_ids=ids).logits, plain, atol=1e-3)
        torch.testing.assert_close(unread[..., :300], plain[..., :300], atol=1e-5, rtol=0)  # a base model's row


def test_separate_models_are_loras_trained_on_one_step_each(tiny: Path) -> None:
    """A step's rows give its expert the gradients of PEFT's LoRA, and the other experts none."""
    given, model, config = rows(tiny, "separate", chains())
    assert not config.shared and config.whole_rows
    for index, _ in enumerate(config.experts):
        own = [row for row in given if row.steps[0] == index + 1]
        assert own and all(set(row.steps) == {index + 1} for row in own)
        take = slice(4 * index, 4 * index + 4)
        theirs = as_peft_lora(tiny, model, 4, 8, take).eval()
        for one in (model, theirs):  # so that 1e-6 is no matter of rounding
            one.double()
        model.zero_grad()
        batch = batch_of(own, config.experts)
        ours = model.eval()(**batch).loss
        ours.backward()
        mask = (batch["document_ids"] >= 0).long()
        expected = theirs(input_ids=batch["input_ids"], attention_mask=mask, labels=batch["labels"]).loss
        expected.backward()
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)
        assert assert_same_gradients(model, theirs, take) == 2 * 2 * 7
        gradients = [p.grad for name, p in model.named_parameters() if "mote_A" in name]
        assert all(torch.equal(g[take].abs().sum(), g.abs().sum()) for g in gradients)  # type: ignore[index, union-attr]


def test_expanded_chains_are_all_outcomes_of_skipping(tiny: Path, tmp_path: Path) -> None:
    """All chains that end with the answer, the full one first; only that one is held out."""
    from mote.train.examples import split_groups

    deepest = chains(3)[2]
    direct = chains(1)[0]
    given, _, _ = rows(tiny, "mote-built", [deepest])
    names = [tuple(dict.fromkeys(step for step in row.steps if step > 0)) for row in given]
    assert names == [(1, 2, 3), (1, 3), (2, 3), (3,)]
    for row, kept in zip(given, names, strict=True):
        cut = deepest.model_copy(update={"steps": tuple(deepest.steps[step - 1] for step in kept)})
        [alone], _, _ = rows(tiny, "mote-no-skip", [cut])
        assert (row.ids, row.labels) == (alone.ids, alone.labels)
    assert len(rows(tiny, "mote-built", [direct])[0]) == 1
    groups = [given, given, given]
    trained, held = split_groups(groups, 0.34, 0, expanded=True)
    assert (len(trained), held) == (8, given[:1])


def test_separate_rows_hold_every_label_of_a_chain_once(tiny: Path) -> None:
    given, _, _ = rows(tiny, "separate", chains(3)[2:])
    [whole], _, _ = rows(tiny, "mote", chains(3)[2:])
    assert [row.steps[0] for row in given] == [1, 2, 3]
    for row, step in zip(given, (1, 2, 3), strict=True):
        assert row.ids == whole.ids[: len(row.ids)]
        own = [label for label, at in zip(whole.labels, whole.steps, strict=True) if at == step]
        assert [label for label in row.labels if label != IGNORED] == own


def test_separate_models_answer_like_each_model_alone(tiny: Path, tmp_path: Path) -> None:
    """Greedy steps equal those of the step's plain LoRA, without mote's routing, on the text so far."""
    folder = trained(tiny, tmp_path / "run", method="separate", num_train_epochs=4)
    model = mote.load(str(tiny), folder / "adapter", device="cpu")
    asked = "how do I answer"
    answer = model.answer(asked, "full", max_step_tokens=6)
    events: list[Any] = []
    assert model.answer(asked, "full", max_step_tokens=6, on_event=events.append).steps == answer.steps
    assert [(e.kind, e.step) for e in events if e.kind != "text"] == [
        *((kind, step) for step in SCHEME.steps for kind in ("begin", "end")), ("done", "response")
    ]  # fmt: skip
    assert events[-1].tokens == answer.tokens.total
    from peft import PeftModel

    from mote.inference.inputs import as_question
    from mote.tokens.encode import decode_steps, encode_prompt, special_ids

    ids = encode_prompt(model.tokenizer, as_question(asked).messages)
    begin = len(ids)
    export_steps(str(folder / "adapter"), tmp_path / "steps", model=str(tiny))
    banned = sorted(special_ids(model.tokenizer))
    for index, step in enumerate(SCHEME.steps):
        base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
        base.resize_token_embeddings(model.config.vocab_size)
        alone = PeftModel.from_pretrained(base, tmp_path / "steps" / step).eval()
        start, end = model.config.markers[step]
        ids = [*ids, start]
        length = 0
        while ids[-1] != end:
            with torch.no_grad():
                scores = alone(input_ids=torch.tensor([ids])).logits[0, -1]
            stop = scores[end].clone()
            scores[banned] = float("-inf")
            if length:
                scores[end] = stop
            ids.append(end if length == 6 else int(scores.argmax()))
            length += 1
        assert index < 3
    assert tuple(decode_steps(model.tokenizer, ids[begin:], model.markers, model.config.experts)) == answer.steps


def test_separate_models_have_no_adaptive_mode(tiny: Path, tmp_path: Path) -> None:
    folder = trained(tiny, tmp_path, method="separate")
    model = mote.load(str(tiny), folder / "adapter", device="cpu")
    with pytest.raises(UserError, match=r"use one of \['direct', 'analysis', 'full'\]"):
        model.answer("how", "adaptive")


@pytest.mark.parametrize("mode", FORCED)
def test_separate_models_keep_small_budgets(tiny: Path, tmp_path: Path, mode: str) -> None:
    model = mote.load(
        str(tiny), save_random_adapter(tiny, tmp_path / "adapter", whole_rows=True, mix=1.0), device="cpu"
    )
    for budget in range(1, 12):
        answer = model.answer("how", mode, max_step_tokens=6, max_tokens=budget)
        assert answer.tokens.total <= budget and (answer.finish == "length" or answer.answer)


def test_response_only_cuts_chains_to_their_answer(tiny: Path, tmp_path: Path) -> None:
    given, _, config = rows(tiny, "response-only", chains())
    assert config.experts == ("response",) and config.total_experts == 1
    assert all(set(row.steps) == {0, 1} for row in given)
    for row, chain in zip(given, [chain for chain in chains() if chain.accepted], strict=True):
        length = sum(label != IGNORED for label in row.labels)
        assert length <= len(chain.steps[-1].text) + 3
    folder = trained(tiny, tmp_path, method="response-only")
    model = mote.load(str(tiny), folder / "adapter", device="cpu")
    assert model.scheme.modes == ("base", "direct", "adaptive")
    with pytest.raises(UserError, match="mode: 'full' is not a mode"):
        model.answer("how", "full")


def test_chains_may_be_cut_to_some_steps(tiny: Path, tmp_path: Path) -> None:
    given, _, config = rows(tiny, "mote", chains(3)[2:], steps=["response", "analysis"])
    assert config.experts == ("analysis", "response") and sorted(set(given[0].steps)) == [0, 1, 2]
    for wrong in (["analysis"], ["response", "answer"]):
        with pytest.raises(UserError, match=r"train\.steps=.*name some of analysis, guidance, response"):
            check_settings(recipe(tiny, steps=wrong), SCHEME, tmp_path)


def test_fourth_expert_learns_only_verdicts(tiny: Path) -> None:
    """Every tried answer gives a row, and the answer is always visible to its verdict."""
    given, model, config = rows(tiny, "four-experts", checked())
    assert config.experts == (*SCHEME.steps, "check")
    verdicts = [row for row in given if 4 in row.steps]
    tried = [check for chain in checked() if chain.rejected is None for check in chain.checks]
    assert len(verdicts) == len(tried) and {check.safe for check in tried} == {True, False}
    texts = []
    for row in verdicts:
        labels = [(label, step) for label, step in zip(row.labels, row.steps, strict=True) if label != IGNORED]
        assert {step for _, step in labels} == {4} and labels[-1][0] == config.markers["check"][1]
        assert set(row.steps) == {0, 3, 4}
        texts.append([label for label, _ in labels[:-1]])
    tokenizer = load_base(str(tiny), device="cpu").tokenizer
    passes, fails = SCHEME.verdicts
    assert sorted(map(tokenizer.decode, texts)) == sorted(passes if check.safe else fails for check in tried)
    unread = checked(1)[0]
    unread = unread.model_copy(
        update={"checks": tuple(check.model_copy(update={"score": None}) for check in unread.checks)}
    )
    assert all(4 not in row.steps for row in rows(tiny, "four-experts", [unread])[0])
    pairs = apply_method(recipe(tiny, method="four-experts", skip_p=1.0), SCHEME).train
    probabilities = skip_probabilities(pairs.skip_p, pairs.skip_pairs, config.experts)
    assert not probabilities[4].any() and probabilities[3, 1] == 1
    model.train()(**batch_of(verdicts, config.experts)).loss.backward()
    gradients = [p.grad.split(4) for name, p in model.named_parameters() if "mote_A" in name]
    assert all(check.any() for *_, check in gradients)


def test_gate_loss_is_added_in_training_only(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"method": "moelora", "learning_rate": 1e-9, "skip_p": 0}
    before = rows_of(trained(tiny, tmp_path / "with", **changes), "loss")[0]["loss"]
    part = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 8}
    in_parts = rows_of(trained(tiny, tmp_path / "parts", **changes, **part), "loss")[0]["loss"]
    held = rows_of(tmp_path / "with", "eval_loss")[-1]["eval_loss"]
    monkeypatch.setattr("mote.train.trainer.gate_loss", lambda model: 0 * gate_loss(model))
    without = rows_of(trained(tiny, tmp_path / "without", **changes), "loss")[0]["loss"]
    assert before > without + 0.01
    assert in_parts == pytest.approx(before, abs=0.01)  # added once an update, whatever its parts
    assert rows_of(tmp_path / "without", "eval_loss")[-1]["eval_loss"] == pytest.approx(held, abs=1e-6)


def test_apply_method_overrides_settings(tiny: Path) -> None:
    def config(method: str) -> Any:
        return mote_config(recipe(tiny, method=method), SCHEME)

    kept = apply_method(recipe(tiny), SCHEME)
    assert kept == recipe(tiny)
    skipping = [name for name in METHODS if METHODS[name].skips]
    assert [apply_method(recipe(tiny, method=name), SCHEME).train.skip_p for name in skipping] == [0.2] * 3
    assert config("mote-no-share").mix == 1 and config("mote-neither").mix == 1
    assert (config("lora").total_experts, config("lora").r, config("lora-x2").r) == (1, 4, 8)
    assert config("lora").scaling(4) == config("lora-x2").scaling(8)
    gated = config("token-moe")
    assert isinstance(gated, TokenGatedConfig) and (gated.gated_experts, gated.top_k, gated.contrast) == (4, 2, 0)
    assert config("moelora").contrast > 0


def test_gated_experts_cannot_be_exported_by_step(tiny: Path, tmp_path: Path) -> None:
    folder = trained(tiny, tmp_path / "run", method="token-moe")
    assert load_peft_weights(str(folder / "adapter"), device="cpu")
    with pytest.raises(UserError, match="has experts that a gate chooses per token"):
        export_steps(str(folder / "adapter"), tmp_path / "out")
