"""What is noticed of another release of the library."""

import ctypes
from importlib import metadata
from typing import Any

import pytest

from mote.core.errors import MoteError, UserError
from mote.inference.engines import llama_library
from mote.inference.engines.llama_library import load_library


@pytest.fixture(autouse=True)
def fresh() -> Any:
    load_library.cache_clear()
    yield
    load_library.cache_clear()


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(UserError, match=r"llama\.cpp is not installed; pip install 'mote-align\[llamacpp\]'"):
        load_library()


def test_another_release_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: "2027.1.1")
    with pytest.raises(UserError, match=r"xllamacpp 2027\.1\.1 is not the release .* xllamacpp==2026"):
        load_library()


@pytest.mark.parametrize("name", ["_ModelParams", "_ContextParams"])
def test_a_structure_with_one_more_field_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    fields = getattr(llama_library, name)._fields_
    other = type(name, (ctypes.Structure,), {"_fields_": [("new", ctypes.c_int64), *fields]})
    changed = {
        function: (other if result is getattr(llama_library, name) else result, arguments)
        for function, (result, arguments) in llama_library._FUNCTIONS.items()
    }
    monkeypatch.setattr(llama_library, "_FUNCTIONS", changed)
    with pytest.raises(MoteError, match="structures of the library xllamacpp are not those expected"):
        load_library()


def test_the_library_has_the_structures_of_this_file() -> None:
    pytest.importorskip("xllamacpp")
    assert load_library().llama_context_default_params().n_batch == 2048
