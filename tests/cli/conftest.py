"""A small recipe and a finished run folder."""

from pathlib import Path

import pytest
from support.cli_runs import assert_finishes, command


@pytest.fixture(scope="session")
def recipe(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(f"name: small\nmodel: {tiny}\n")
    return path


@pytest.fixture(scope="session")
def done(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run folder; tests only read it."""
    folder = tmp_path_factory.mktemp("done")
    assert_finishes(folder, command(recipe, folder / "run"))
    return folder / "run"
