from pathlib import Path

import pytest

from mote.core.recipe_file import load_recipe


@pytest.mark.parametrize("place", ["file", "override"])
def test_the_old_name_of_keep_old_is_read_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("chains: {mix: true}" if place == "file" else "chains: {keep_old: false}")
    recipe = load_recipe(path, ["chains.mix=true"] if place == "override" else [])
    assert recipe.chains.keep_old and recipe.experts.mix == 0.5
    assert capsys.readouterr().err == "recipe: chains.mix is now chains.keep_old; write the new name\n"
