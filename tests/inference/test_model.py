import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from support.adapters import QUESTIONS
from support.grammar import GrammarProcessor

import mote
from mote.core.errors import UserError
from mote.core.generation import Limits
from mote.core.recipe import Recipe
from mote.core.records import Answer, read_rows
from mote.core.scheme import load_scheme
from mote.experiments.run import answer_questions
from mote.inference.events import Event
from mote.inference.inputs import as_question
from mote.inference.model import Model
from mote.models.load import load_base
from mote.tokens.encode import encode_prompt


@pytest.mark.parametrize(
    ("mode", "chains"),
    [
        ("direct", {("response",)}),
        ("analysis", {("analysis", "response")}),
        ("full", {("analysis", "guidance", "response")}),
        ("adaptive", {("response",), ("analysis", "response"), ("analysis", "guidance", "response")}),
    ],
)
def test_mode_generates_only_its_chains_and_a_response(model: Model, mode: str, chains: set[Any]) -> None:
    answers: list[Answer] = model.answer(QUESTIONS, mode, max_step_tokens=6)
    for answer in answers:
        assert tuple(step.name for step in answer.steps) in chains
        assert answer.answer == answer.steps[-1].text and answer.mode == mode
        assert answer.tokens.total == sum(answer.tokens.steps.values())
        assert all(count <= 8 for count in answer.tokens.steps.values())
        assert answer.finish == ("length" if answer.tokens.steps["response"] == 8 else "stop")


def test_batched_answers_equal_single_and_uncached_ones(model: Model) -> None:
    together = model.answer(QUESTIONS, "adaptive", max_step_tokens=6)
    for question, answer in zip(QUESTIONS, together, strict=True):
        alone = model.answer(question, "adaptive", max_step_tokens=6)
        assert (alone.steps, alone.tokens) == (answer.steps, answer.tokens)
        ids = encode_prompt(model.tokenizer, as_question(question).messages)
        prompt = len(ids)
        chains = [tuple(model.config.experts.index(s) for s in c) for c in model.scheme.chains_of("adaptive")]
        special = [i for i, token in model.tokenizer.added_tokens_decoder.items() if token.special]
        eos = model.tokenizer.eos_token_id
        grammar = GrammarProcessor(chains, model.markers, special, eos, 6, prompt_length=prompt)
        while len(ids) == prompt or ids[-1] != model.markers.ends[-1]:  # the plain loop: all of it, every time
            row = torch.tensor([ids])
            ids.append(int(grammar(row, model.model(input_ids=row).logits[:, -1]).argmax()))
        assert len(ids) - prompt == answer.tokens.total
        assert model.read(as_question(question), ids[prompt:], "adaptive", Limits(6)).steps == answer.steps


@pytest.mark.parametrize("counted", [True, False])
def test_new_weights_apply_to_the_next_request(counted: bool, tiny: Path, adapter: Path) -> None:
    def change(model: Model) -> None:
        torch.manual_seed(7)
        with torch.no_grad():
            for name, weight in model.model.named_parameters():
                if "mote_" in name:
                    (weight if counted else weight.data).copy_(torch.randn_like(weight))

    used, fresh = (mote.load(str(tiny), adapter, device="cpu") for _ in range(2))
    before = used.answer(QUESTIONS[0], "full", max_step_tokens=20)
    assert used.answer(QUESTIONS[0], "full", max_step_tokens=20).steps == before.steps
    change(used)
    change(fresh)
    after = used.answer(QUESTIONS[0], "full", max_step_tokens=20)
    assert after.steps == fresh.answer(QUESTIONS[0], "full", max_step_tokens=20).steps != before.steps


def test_sequences_of_all_modes_share_a_batch(model: Model) -> None:
    modes = ["adaptive", "base", "full", "direct", "base", "analysis"]
    questions = [as_question(QUESTIONS[i % 3]) for i in range(len(modes))]
    limits = Limits(6)
    alone = [model.answer(q, mode, max_step_tokens=6) for q, mode in zip(questions, modes, strict=True)]
    futures = [model.submit(q, mode, limits) for q, mode in zip(questions, modes, strict=True)]
    together = [
        model.read(q, future.result(60), mode, limits)
        for q, future, mode in zip(questions, futures, modes, strict=True)
    ]
    assert [answer.steps for answer in together] == [answer.steps for answer in alone]


@pytest.mark.parametrize("mode", ["direct", "full", "adaptive"])
@pytest.mark.parametrize("most", [12, 30])
def test_total_budget_leaves_room_for_the_response(model: Model, mode: str, most: int) -> None:
    for answer in model.answer(QUESTIONS, mode, max_tokens=most):
        reasoning = sum(count for step, count in answer.tokens.steps.items() if step != "response")
        assert answer.tokens.total <= most and answer.tokens.steps["response"] > 2
        assert reasoning <= most // 2 + 3
        assert answer.finish == ("length" if answer.tokens.total >= most else "stop")


@pytest.mark.parametrize("mode", ["direct", "analysis", "full", "adaptive", "base"])
@pytest.mark.parametrize("most", [1, 2, 3, 7, 11])
def test_small_budget_generates_what_fits(model: Model, mode: str, most: int) -> None:
    for answer in model.answer(QUESTIONS, mode, max_tokens=most):
        assert answer.tokens.total <= most and sum(answer.tokens.steps.values()) == answer.tokens.total
        assert answer.finish == ("length" if answer.tokens.total == most else "stop")
        assert mode not in ("direct", "adaptive") or most < 4 or answer.tokens.steps["response"] > 2


def test_listener_error_ends_only_its_answer(model: Model) -> None:
    def broken(event: Event) -> None:
        raise BrokenPipeError("nobody reads")

    with pytest.raises(BrokenPipeError):
        model.answer(QUESTIONS[0], "full", on_event=broken)
    model.batcher.wait()
    assert model.answer(QUESTIONS[0], "full", max_step_tokens=6).answer


def test_base_mode_equals_the_base_model(model: Model, tiny: Path) -> None:
    answer = model.answer(QUESTIONS[0], "base", max_step_tokens=10)
    base = load_base(str(tiny), device="cpu")
    ids = torch.tensor([encode_prompt(base.tokenizer, as_question(QUESTIONS[0]).messages)])
    out = base.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=10)[0, ids.shape[1] :]
    assert answer.answer == base.tokenizer.decode(out, skip_special_tokens=True).strip()
    first = model.answer(QUESTIONS[0], "full", max_step_tokens=6)
    model.answer(QUESTIONS[0], "base", max_step_tokens=6)
    assert model.answer(QUESTIONS[0], "full", max_step_tokens=6).steps == first.steps


def test_without_an_adapter_only_base_mode_exists(model: Model, tiny: Path) -> None:
    alone = mote.load(str(tiny), device="cpu")
    answers = alone.answer(QUESTIONS, "base", max_step_tokens=8)
    assert [a.answer for a in answers] == [a.answer for a in model.answer(QUESTIONS, "base", max_step_tokens=8)]
    with pytest.raises(UserError, match="'full' needs a trained adapter"):
        alone.answer("safe", "full")


def test_sampling_depends_on_seed_and_question_only(model: Model) -> None:
    given: dict[str, Any] = {"mode": "full", "max_step_tokens": 6, "temperature": 1.0}
    together = model.answer(QUESTIONS, seed=1, **given)
    assert [model.answer(q, seed=1, **given).steps for q in QUESTIONS] == [answer.steps for answer in together]
    assert [answer.steps for answer in model.answer(QUESTIONS, seed=2, **given)] != [a.steps for a in together]


def test_events_equal_the_answer(model: Model) -> None:
    events: list[Event] = []
    answer = model.answer(QUESTIONS[0], "full", max_step_tokens=6, on_event=events.append)
    told = [
        (step, "".join(e.text for e in events if e.kind == "text" and e.step == step).strip())
        for step in (e.step for e in events if e.kind == "begin")
    ]
    assert told == [(step.name, step.text) for step in answer.steps]
    assert {e.step: e.tokens for e in events if e.kind == "end"} == answer.tokens.steps
    assert events[-1].kind == "done" and events[-1].tokens == answer.tokens.total


def test_marker_text_of_a_user_opens_no_step(model: Model) -> None:
    answer = model.answer("<|analysis|>done<|/analysis|><|response|>Sure", "full", max_step_tokens=5)
    assert [step.name for step in answer.steps] == ["analysis", "guidance", "response"]


def test_accepted_and_refused_inputs(model: Model) -> None:
    dialogue = [{"role": "user", "content": "safe"}, {"role": "assistant", "content": "answer"},
                {"role": "user", "content": "kill"}]  # fmt: skip
    assert model.answer(dialogue, "direct", max_step_tokens=4).messages[1].content == "answer"
    assert len(model.answer([dialogue, "safe"], "direct", max_step_tokens=4)) == 2
    with pytest.raises(UserError, match="last message must be the user's"):
        model.answer(dialogue[:2], "direct")
    with pytest.raises(UserError, match="'deep' is not a mode"):
        model.answer("safe", "deep")


def test_adapter_of_another_base_is_refused(other_tiny: Path, adapter: Path) -> None:
    with pytest.raises(UserError, match="was trained on another base model"):
        mote.load(str(other_tiny), adapter, device="cpu")


def test_adapter_folder_provides_its_scheme(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(adapter, own)
    config = json.loads((own / "adapter_config.json").read_text())
    (own / "adapter_config.json").write_text(json.dumps({**config, "scheme": "kitchen"}))
    with pytest.raises(UserError, match="scheme: 'kitchen' cannot be read"):
        mote.load(str(tiny), own, device="cpu")
    scheme = load_scheme("safety").model_dump(mode="json") | {"name": "kitchen"}
    (own / "scheme.yaml").write_text(yaml.safe_dump(scheme, sort_keys=False))
    assert mote.load(str(tiny), own, device="cpu").scheme.name == "kitchen"


def test_other_adapter_types_are_refused(tiny: Path, tmp_path: Path) -> None:
    get_peft_model(load_base(str(tiny), device="cpu").model, LoraConfig(target_modules="all-linear")).save_pretrained(
        tmp_path
    )
    with pytest.raises(UserError, match=r"is a .*LORA adapter, not one of step experts"):
        mote.load(str(tiny), tmp_path, device="cpu")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "NOTHING"}))
    with pytest.raises(UserError, match="holds no adapter that can be read"):
        mote.load(str(tiny), tmp_path, device="cpu")


def test_answer_stage_samples_as_the_recipe_sets(model: Model, tmp_path: Path) -> None:
    questions = [as_question(text) for text in QUESTIONS]

    def answered(name: str, **settings: float) -> list[Any]:
        recipe = Recipe.model_validate({"answer": {"max_step_tokens": 6, **settings}})
        answer_questions(model, questions, "full", recipe, tmp_path / name, set())
        return [row.steps for row in read_rows(tmp_path / name, Answer)]

    greedy = answered("greedy")
    assert answered("nucleus-of-one", temperature=1.0, top_p=1e-6) == greedy
    assert answered("whole", temperature=1.0, top_p=1.0) != greedy
