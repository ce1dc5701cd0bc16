"""The stage `eval` of `mote run`: judged answers in the run folder, resumable, checked before anything starts."""

import json
from pathlib import Path
from typing import Any

import pytest

from mote.core.errors import UserError
from mote.core.recipe_file import dump_recipe, load_recipe
from mote.evals.provider import MoteAPI
from mote.experiments import eval_stage, plan, run
from mote.experiments.run import Run
from mote.experiments.throughput import Machine

MACHINE = Machine(device="cpu", dtype="float32", flops=100e9, bandwidth=10e9, memory=24_000_000_000)


@pytest.fixture
def recipe(tiny: Path, tmp_path: Path) -> Any:
    """A recipe with a suite of two questions in two modes."""
    suite = tmp_path / "two.yaml"
    suite.write_text(
        "name: two\nmax_step_tokens: 4\nbatch_size: 4\n"
        "tasks: [{task: xstest, file: mote:test, judge: rule, limit: 2}]\n"
    )
    overrides = [f"model={tiny}", "device=cpu", "limit=4", "answer.modes=[base,direct]", f"eval.suite={suite}"]
    return load_recipe(None, overrides)


def off(recipe: Any) -> Any:
    return recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"suite": None})})


def stages(folder: Path) -> dict[str, Any]:
    return {stage["stage"]: stage for stage in json.loads((folder / "environment.json").read_text())["stages"]}


def test_run_folder_gets_judged_answers(
    recipe: Any, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    Run(recipe, folder).evaluate(adapter)
    assert "eval: 4 judged answers to the suite two" in capsys.readouterr().err
    rows = [json.loads(line) for line in (folder / "evals" / "results.jsonl").read_text().splitlines()]
    assert sorted((row["system"], row["mode"]) for row in rows) == [("base", "base")] * 2 + [("mote", "direct")] * 2
    assert stages(folder)["eval"]["made_by"]["suite"]["name"] == "two"
    Run(recipe, folder).report()
    assert json.loads((folder / "report.json").read_text())["evaluation"]["suite"] == "two"

    async def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is left to generate")

    monkeypatch.setattr(MoteAPI, "generate", fail)
    Run(recipe, folder).evaluate(adapter)
    assert "eval: reused" in capsys.readouterr().err
    (folder / "evals" / "summary.json").unlink()  # as if it had been killed before the end
    Run(recipe, folder).evaluate(adapter)
    assert "eval: 4 judged answers" in capsys.readouterr().err
    assert (folder / "evals" / "summary.json").exists()


def test_run_evaluates_between_answer_and_report(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for stage in ("claim", "chains", "train", "answer", "evaluate", "report"):
        monkeypatch.setattr(Run, stage, lambda self, *_, stage=stage: done.append(stage))
    Run(recipe, tmp_path).all()
    assert done == ["claim", "chains", "train", "answer", "evaluate", "report"]


def test_evaluation_may_be_left_out(recipe: Any, adapter: Path, tmp_path: Path) -> None:
    assert load_recipe(None, ["eval=false"]).eval.suite is None
    assert load_recipe(None, ["eval=true"]).eval == load_recipe(None).eval
    assert load_recipe(None).eval.suite == "smoke"
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(off(recipe)))
    assert load_recipe(path) == off(recipe)
    Run(off(recipe), tmp_path / "run").evaluate(adapter)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"unknown setting 'eval\.suit'; did you mean 'eval\.suite'"):
        load_recipe(None, ["eval.suit=smoke"])


def test_without_inspect_the_run_says_so_first(
    recipe: Any, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (eval_stage, run, plan):
        monkeypatch.setattr(module, "inspect_is_installed", lambda: False)
    Run(recipe, tmp_path / "run").claim()
    assert "eval: inspect-ai is not installed, so the run ends without" in capsys.readouterr().err
    Run(recipe, tmp_path / "run").evaluate(adapter)
    assert not (tmp_path / "run" / "evals").exists()
    found = plan.plan(recipe, MACHINE)
    assert "eval" not in [stage.name for stage in found.stages]
    assert any("inspect-ai is not installed" in note for note in found.notes)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (
            ["eval.suite=paper"],
            r"eval\.suite=paper: .*harmless-base\.jsonl\.gz .* does not exist; .* eval\.data=FOLDER",
        ),
        (["eval.suite=nothing"], "suite: 'nothing' cannot be read"),
        (["eval.suite=SUITE"], r"eval\.judge=null: the task xstest .* needs a judge; .* eval\.judge=llm:MODEL"),
        (["eval.suite=SUITE", "eval.judge=nobody"], "judge: 'nobody' is not a judge"),
    ],
)
def test_impossible_evaluations_are_refused_at_once(
    recipe: Any, tmp_path: Path, overrides: list[str], complaint: str
) -> None:
    suite = tmp_path / "unjudged.yaml"
    suite.write_text("name: unjudged\ntasks:\n  - {task: xstest, file: mote:test}\n")
    wanted = load_recipe(None, [f"model={recipe.model}", *(text.replace("SUITE", str(suite)) for text in overrides)])
    for start in (Run(wanted, tmp_path / "run").claim, lambda: plan.plan(wanted, MACHINE)):
        with pytest.raises(UserError, match=complaint):
            start()
    assert not (tmp_path / "run").exists()


def test_the_plan_shows_the_evaluation(recipe: Any) -> None:
    found = {stage.name: stage for stage in plan.plan(recipe, MACHINE).stages}
    assert list(found) == ["questions", "chains", "train", "answer", "eval", "report"]
    assert found["eval"].what == "suite two: 4 judged answers" and found["eval"].seconds
    assert "eval" not in [stage.name for stage in plan.plan(off(recipe), MACHINE).stages]


def test_folder_of_a_recipe_without_the_setting_is_kept(recipe: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = load_recipe(None, [f"model={recipe.model}", "limit=4"])
    Run(recipe, folder).claim()
    path = folder / "recipe.yaml"
    older = path.read_text().replace("eval:\n  suite: smoke\n  judge: null\n  data: null\n  limit: null\n", "")
    assert older != path.read_text()
    path.write_text(older)
    Run(recipe, folder).claim()
    assert path.read_text() == dump_recipe(recipe)
    with pytest.raises(UserError, match=r"holds the run of another recipe \(it differs in eval\.suite\)"):
        Run(off(recipe), folder).claim()
