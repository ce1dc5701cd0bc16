"""Whole files appear at once or not at all."""

import os
from pathlib import Path

import pytest

from mote.core.errors import MoteError
from mote.core.files import write_atomic, write_json


def test_whole_files_appear_at_once_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MoteError, match="No space left"):
        write_atomic(path, "something else")
    assert path.read_text() == '{\n  "a": 1\n}\n' and [p.name for p in tmp_path.iterdir()] == ["report.json"]
