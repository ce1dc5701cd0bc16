"""A served model with random step experts."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.adapters import save_random_adapter
from support.servers import served

import mote
from mote.inference.model import Model
from mote.serve.server import Server


@pytest.fixture(scope="module")
def model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    adapter = save_random_adapter(tiny, tmp_path_factory.mktemp("adapter"))
    return mote.load(str(tiny), adapter, device="cpu", batch_size=16)


@pytest.fixture(scope="module")
def running(model: Model) -> Iterator[tuple[str, Server]]:
    with served(model) as running:
        yield running


@pytest.fixture(scope="module")
def address(running: tuple[str, Server]) -> str:
    return running[0]
