"""Folders that are there as a whole or not at all, and what each writer says of a full disk."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.disk import largest_file
from transformers import AutoTokenizer

from mote.core.errors import MoteError, UserError
from mote.core.files import check_new, whole, writing


def test_a_folder_comes_with_all_its_files(tmp_path: Path) -> None:
    with whole(tmp_path / "in" / "out") as scratch:
        (scratch / "file").write_text("text")
        assert not (tmp_path / "in" / "out").exists()
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["out"]
    assert (tmp_path / "in" / "out" / "file").read_text() == "text"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError])
def test_nothing_stays_of_a_folder_that_was_cut(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), whole(tmp_path / "out") as scratch:
        (scratch / "file").write_text("text")
        raise error
    assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "torn").touch()
    with whole(tmp_path / "out") as scratch:
        (scratch / "file").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def test_only_an_empty_folder_is_new(tmp_path: Path) -> None:
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
def test_a_full_disk_is_one_line_whoever_writes(tmp_path: Path, tiny: Path, writer: str) -> None:
    with pytest.raises(MoteError) as found, largest_file(3000), writing("train", tmp_path, "run it again"):
        WRITERS[writer](tmp_path, tiny)
    line = str(found.value)
    assert line.startswith(f"train: {tmp_path} cannot be written (") and "\n" not in line
    assert line.endswith("; free space there, then run it again")


def test_other_failures_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), writing("train", Path("out"), ""):
        raise RuntimeError("shapes differ")
