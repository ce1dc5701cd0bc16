"""Atomic files and folders, and one line for a full disk whichever library writes."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.disk import largest_file
from transformers import AutoTokenizer

from mote.core.errors import MoteError, UserError
from mote.core.files import atomic_folder, check_new, disk_errors, write_atomic, write_json


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MoteError, match="No space left"):
        write_atomic(path, "something else")
    assert path.read_text() == '{\n  "a": 1\n}\n' and [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_a_folder_appears_with_all_its_files(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "in" / "out") as scratch:
        (scratch / "file").write_text("text")
        assert not (tmp_path / "in" / "out").exists()
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["out"]
    assert (tmp_path / "in" / "out" / "file").read_text() == "text"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError])
def test_nothing_remains_of_an_interrupted_folder(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_folder(tmp_path / "out") as scratch:
        (scratch / "file").write_text("text")
        raise error
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_writer_are_discarded(tmp_path: Path) -> None:
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "torn").touch()
    with atomic_folder(tmp_path / "out") as scratch:
        (scratch / "file").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def test_only_a_missing_or_empty_folder_is_new(tmp_path: Path) -> None:
    check_new(tmp_path / "none")
    check_new(tmp_path)
    (tmp_path / "file").touch()
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match=f"out: {taken} exists and is not empty; give another folder with --out"):
            check_new(taken)


WRITERS: dict[str, Callable[[Path, Path], object]] = {
    "python": lambda folder, _: (folder / "text").write_text("x" * 5000),
    "safetensors": lambda folder, _: save_file({"x": torch.zeros(5000)}, folder / "x.safetensors"),
    "torch": lambda folder, _: torch.save(torch.zeros(5000), folder / "x.pt"),
    "tokenizers": lambda folder, tiny: AutoTokenizer.from_pretrained(tiny).save_pretrained(folder),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_line_for_every_writer(tmp_path: Path, tiny: Path, writer: str) -> None:
    with pytest.raises(MoteError) as found, largest_file(3000), disk_errors("train", tmp_path, "run it again"):
        WRITERS[writer](tmp_path, tiny)
    line = str(found.value)
    assert line.startswith(f"train: {tmp_path} cannot be written (") and "\n" not in line
    assert line.endswith("; free space there, then run it again")


def test_other_errors_pass_through() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), disk_errors("train", Path("out"), ""):
        raise RuntimeError("shapes differ")
