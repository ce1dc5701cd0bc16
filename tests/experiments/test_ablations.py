"""Ablations: every variant and seed is trained on the same chains and measured; an interrupted run resumes."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.checked_chains import checked
from support.paths import ROOT

from mote import cli
from mote.core.errors import UserError
from mote.core.methods import METHODS
from mote.core.records import ChainRow, read_rows, rewrite_rows
from mote.experiments.ablations import Ablations, load_ablations, run_ablations
from mote.experiments.ablations.ablation_results import Measured, Result, interval, markdown, summary_of
from mote.experiments.run import Run

SHARED = {
    "experts": {"r": 2}, "answer": {"limit": 2, "max_step_tokens": 3, "modes": ["base", "direct", "full", "adaptive"]},
    "train": {"num_train_epochs": 1, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "held_out": 0.2},
}  # fmt: skip


def files(folder: Path, tiny: Path, variants: list[dict[str, Any]], seeds: list[int]) -> Path:
    (folder / "shared.yaml").write_text(yaml.safe_dump({"model": str(tiny), "device": "cpu", **SHARED}))
    data = {"name": "test", "recipe": "shared.yaml", "settings": {"answer.limit": 3}, "seeds": seeds}
    (folder / "ablations.yaml").write_text(yaml.safe_dump({**data, "variants": variants}))
    rewrite_rows(folder / "chains.jsonl", checked())
    return folder / "ablations.yaml"


def test_every_variant_is_trained_and_measured(tiny: Path, tmp_path: Path) -> None:
    own = {"chains": str(tmp_path / "chains.jsonl")}
    variants = [
        {"name": "MoTE", **own},
        {"name": "three models", "method": "separate", **own},
        {"name": "short, wide", "method": "response-only", "settings": {"experts.r": 4}, **own},
    ]
    wanted = load_ablations(files(tmp_path, tiny, variants, [0, 5]))
    result = run_ablations(wanted, tmp_path / "out")
    assert [(row.variant, row.seed) for row in result.rows] == [
        (name, seed) for name in ("MoTE", "three models", "short, wide") for seed in (0, 5)
    ]
    assert not (tmp_path / "out" / "shared").exists()  # no variant needs them
    mote, separate, short = result.summary
    assert {"loss all", "loss analysis", "tokens direct", "tokens full", "tokens adaptive"} <= set(mote.measures)
    assert mote.measures["tokens of training"].mean > 100 and mote.measures["seconds of training"].mean > 0
    assert "tokens adaptive" not in separate.measures and "tokens full" not in short.measures
    assert not any("base" in name for line in result.summary for name in line.measures)
    losses = [
        [row["eval_loss"] for row in map(json.loads, (tmp_path / "out" / "mote" / f"seed-{seed}" / "metrics.jsonl")
                                         .read_text().splitlines()) if "eval_loss" in row][-1]
        for seed in (0, 5)
    ]  # fmt: skip
    assert losses[0] != losses[1]
    assert mote.measures["loss all"].mean == pytest.approx(sum(losses) / 2)
    assert mote.measures["loss all"].half == pytest.approx(12.706 * abs(losses[0] - losses[1]) / 2)
    table = (tmp_path / "out" / "ablations.md").read_text()
    assert table == markdown(result) and f"| three models | separate | {separate.trained_parameters:,} |" in table
    saved = json.loads((tmp_path / "out" / "ablations.json").read_text())
    assert len(saved["rows"]) == 6 and saved["environment"]["versions"]["torch"]
    weights = tmp_path / "out" / "mote" / "seed-5" / "adapter" / "adapter_model.safetensors"
    before = weights.stat().st_mtime_ns
    assert run_ablations(wanted, tmp_path / "out") == result
    assert weights.stat().st_mtime_ns == before


def test_chains_are_shared_by_all_variants(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def chains(run: Run) -> None:
        made.append(run.recipe.seed)
        rewrite_rows(run.folder / "chains.jsonl", checked())

    monkeypatch.setattr(Run, "chains", chains)
    run_ablations(load_ablations(files(tmp_path, tiny, [{"name": "A"}], [3, 4]), ["seed=9"]), tmp_path / "out")
    assert made == [9]


def test_human_replies_replace_the_chains(tiny: Path, tmp_path: Path) -> None:
    """On the same questions; those without a reply in the file are left out."""
    human = tmp_path / "hh.jsonl"
    asked = [row.model_copy(update={"id": ""}) for row in checked(6)]
    human.write_text(
        "".join(
            json.dumps({"chosen": f"\n\nHuman: {row.text}\n\nAssistant: people say {i}"}) + "\n"
            for i, row in enumerate(asked[:4])
        )
    )
    from mote.questions.load import load_questions

    ids = {question.text: question.id for question in load_questions(str(human), None)}
    rows = [row.model_copy(update={"id": ids.get(row.text, row.id)}) for row in checked(6)]
    variant = {"name": "human", "method": "response-only", "replies": True}
    path = files(tmp_path, tiny, [{**variant, "chains": str(tmp_path / "c.jsonl")}], [0])
    rewrite_rows(tmp_path / "c.jsonl", rows)
    run_ablations(load_ablations(path, [f"questions={human}"]), tmp_path / "out")
    found = read_rows(tmp_path / "out" / "human" / "seed-0" / "chains.jsonl", ChainRow)
    assert [[step.text for step in row.steps] for row in found] == [[f"people say {i}"] for i in range(4)]


def test_overrides_reach_keys_of_the_ablations_file(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({"model": "other/model", "limit": 5}))
    path = files(tmp_path, tiny, [{"name": "a"}], [0])
    wanted = load_ablations(path, ["seeds=[4, 5]", "tasks=[hh-harm]", f"recipe={tmp_path / 'other.yaml'}", "limit=7"])
    assert (wanted.seeds, wanted.tasks, wanted.recipe.model, wanted.recipe.limit) == (
        (4, 5),
        ("hh-harm",),
        "other/model",
        7,
    )
    assert wanted.recipe.answer.limit == 3  # the settings of the file stand above either recipe


@pytest.mark.parametrize("given", ["seeds=1", "seeds=[]", "seeds=[0, x]", "tasks=7"])
def test_invalid_overrides_name_the_valid_values(given: str, tiny: Path, tmp_path: Path) -> None:
    key, _, value = given.partition("=")
    with pytest.raises(UserError) as caught:
        load_ablations(files(tmp_path, tiny, [{"name": "a"}], [0]), [given])
    said = str(caught.value)
    assert said.startswith(f"{key}: '{value}' is not valid; give ") and f"as in {key}=[" in said


def test_intervals_use_students_t() -> None:
    assert interval([2.0]).half is None
    three = interval([1.0, 2.0, 4.5])
    spread = math.sqrt(((1 - 2.5) ** 2 + (2 - 2.5) ** 2 + (4.5 - 2.5) ** 2) / 2)
    assert three.mean == pytest.approx(2.5) and three.half == pytest.approx(4.303 * spread / math.sqrt(3))
    assert interval([1.0, 2.0] * 10).half == pytest.approx(1.96 * math.sqrt(5 / 19) / math.sqrt(20))
    rows = [
        Measured(variant="a", method="mote", seed=s, trained_parameters=7, measures={"m": 10.0 * s}) for s in (1, 2)
    ]
    result = Result(name="t", seeds=(1, 2), rows=tuple(rows), summary=summary_of(rows))
    assert "| a | mote | 7 | 15.0 ± 63.5 |" in markdown(result)


@pytest.mark.parametrize(
    ("variants", "complaint"),
    [
        ([{"name": "a b"}, {"name": "A, b"}], "two variants share the folder 'a-b'"),
        ([{"name": "a", "method": "magic"}], "not a recipe of ablations: variants.0.method"),
        ([{"name": "a", "speed": 1}], "variants.0.speed"),
        ([], "variants"),
        ([{"name": "a", "kind": "guessed"}], "variants.0.kind"),
    ],
)
def test_invalid_ablation_recipes_are_refused(variants: Any, complaint: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=complaint):
        load_ablations(files(tmp_path, tiny, variants, [0]))


def test_invalid_variants_are_refused_before_the_run(tiny: Path, tmp_path: Path) -> None:
    for settings, complaint in (
        ({"train.skip_p": 2}, "the variant 'a': train.skip_p"),
        ({"train.learning_rat": 2}, r"unknown setting 'train\.learning_rat'"),
        ({"answer.modes": ["base"]}, "'a' can answer in none of them"),
        ({"scheme": "safety", "kind": "prompted"}, "the variant 'a': scheme=safety has several chains"),
    ):
        kind = settings.pop("kind", "trained")
        variant = {"name": "a", "kind": kind, "settings": settings}
        wanted: Ablations = load_ablations(files(tmp_path, tiny, [variant], [0]))
        with pytest.raises(UserError, match=complaint):
            run_ablations(wanted, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="cannot be read"):
        load_ablations(tmp_path / "no.yaml")


def test_methods_recipe_plans_every_method(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "recipes" / "comparisons" / "methods.yaml"
    assert path.read_text().startswith("# mote ablations recipes/comparisons/methods.yaml ")
    assert [variant.method for variant in load_ablations(path).variants] == [m for m in METHODS if m != "mote-built"]
    with pytest.MonkeyPatch.context() as patch:
        words = ["ablations", path, f"model={tiny}", "--dry-run", "--out", tmp_path / "out"]
        patch.setattr("sys.argv", ["mote", *map(str, words)])
        cli.main()
    said = capsys.readouterr().out
    for method in METHODS:
        assert (re.search(rf" {method} +1 +[\d,]+ ", said) is None) == (method == "mote-built")
    assert "judged" not in said and not (tmp_path / "out").exists()
