"""Every table and figure of the paper by its recipe, from end to end on a tiny model, beside the paper's numbers."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from mote import cli
from mote.ablations import load_ablations
from mote.ablations.paper import Cell, PaperComparison, paper_setup, paper_table
from mote.ablations.recipe import recipe_of
from mote.config import load_recipe
from mote.errors import UserError
from mote.steps import load_scheme
from mote.train import check_settings

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes" / "paper").glob("*.yaml"))
SMALL = {
    "limit": 8, "chains": {"max_tokens": 8, "check": "self", "threshold": 0.5, "retries": 0, "reject": []},
    "experts": {"r": 2}, "answer": {"limit": 1, "max_step_tokens": 8, "batch_size": 4},
    "train": {"num_train_epochs": 1, "per_device_train_batch_size": 6, "learning_rate": 1e-3, "held_out": 0.2},
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for the tiny model, and questions with human replies."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "small.yaml").write_text(yaml.safe_dump({"model": str(tiny), "device": "cpu", **SMALL}))
    rows = [{"chosen": f"\n\nHuman: How do I kill process {i}?\n\nAssistant: Stop it, {i}."} for i in range(6)]
    (folder / "hh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def runs(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each recipe's run; those on the same questions share their chains."""
    patch = pytest.MonkeyPatch()
    folders = {path.stem: tmp_path_factory.mktemp(path.stem) / "out" for path in RECIPES}
    given = [f"recipe={small / 'small.yaml'}", "seeds=[0]"]
    for name, out in folders.items():
        if name != "figure7" and (shared := folders["figure5"] / "shared").exists():
            shutil.copytree(shared, out / "shared")
        own = [f"questions={small / 'hh.jsonl'}"] if name == "figure7" else []
        arguments = ["ablations", ROOT / "recipes" / "paper" / f"{name}.yaml", *given, *own, "--out", out]
        patch.setattr("sys.argv", ["mote", *map(str, arguments)])
        cli.main()
    patch.undo()
    return folders


def table_of(folder: Path) -> PaperComparison:
    found = json.loads((folder / "table.json").read_text())
    assert found.pop("environment")["versions"]["torch"]
    return PaperComparison.model_validate(found)


@pytest.mark.parametrize("name", [path.stem for path in RECIPES])
def test_a_recipe_gives_the_papers_rows_beside_ours(name: str, runs: dict[str, Path]) -> None:
    table, paper = table_of(runs[name]), paper_table(name)
    print((runs[name] / "table.md").read_text())
    assert table.title == paper.title
