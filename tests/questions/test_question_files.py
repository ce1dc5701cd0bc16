"""Question files of every layout, and one line for each kind of invalid file."""

import gzip
import json
import sys
from pathlib import Path

import pytest
from support.questions import assert_refused
from support.tiny import Write

from mote.core.errors import UserError
from mote.questions.load import load_questions

ROW = {"chosen": "\n\nHuman: Why?\n\nAssistant: Because.", "rejected": ""}


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_text_file_has_one_question_per_line(write: Write, end: str) -> None:
    file = write(f"\ufeffWhat is, say, a lake?\n\n  [Odd] one?  {end}", "mine.txt")
    assert [question.text for question in load_questions(file, None)] == ["What is, say, a lake?", "[Odd] one?"]


def test_the_layout_is_detected_from_the_bytes(write: Write) -> None:
    rows = json.dumps(ROW).encode() + b"\n"
    assert load_questions(write(gzip.compress(rows), "no-suffix"), None)[0].source == "hh-rlhf"
    assert load_questions(write(rows, "really.csv"), None)[0].source == "hh-rlhf"
    assert load_questions(write("prompt\nWhy?\n", "really.data"), None)[0].text == "Why?"
    assert load_questions(write('[{"question": "Why?"}]', "really.jsonl"), None)[0].text == "Why?"
    assert load_questions(write(gzip.compress(b"Why?\n"), "mine.txt.gz"), None)[0].text == "Why?"


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nope\.jsonl does not exist; give a path, or one of .*mote:train"):
        load_questions(str(tmp_path / "nope.jsonl"), None)
    with pytest.raises(UserError, match="is a folder; give a file"):
        load_questions(str(tmp_path), None)
    with pytest.raises(UserError, match="'mote:dev' is not a set of this package; use one of"):
        load_questions("mote:dev", None)
    with pytest.raises(UserError, match="cannot be read"):
        load_questions("x" * 5000, None)


def test_an_unreadable_file_is_one_line(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write([ROW])

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match=r"questions\.jsonl cannot be read \(Permission denied\); check its rights"):
        load_questions(file, None)


def test_a_csv_file_may_have_a_huge_column(write: Write) -> None:
    file = write(f"prompt,page\nWhy?,{'x' * 150_000}\n", "q.csv")
    assert [question.text for question in load_questions(file, None)] == ["Why?"]


def test_a_parquet_file_is_read(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [
        {"question": "Why?", "messages": None},
        {"question": None, "messages": [{"role": "user", "content": "How?"}]},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "q.parquet")
    assert [question.text for question in load_questions(str(tmp_path / "q.parquet"), None)] == ["Why?", "How?"]
    torn = (tmp_path / "q.parquet").read_bytes()[:-20]
    (tmp_path / "torn.parquet").write_bytes(torn)
    with pytest.raises(UserError, match=r"torn\.parquet is a damaged or cut off Parquet file .*; get it again"):
        load_questions(str(tmp_path / "torn.parquet"), None)


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "q.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"q\.parquet is a Parquet file; pip install 'mote-align\[data\]' to read it"):
        load_questions(str(tmp_path / "q.parquet"), None)


BAD: dict[str, tuple[object, str, list[str]]] = {
    "empty": ("", "q.jsonl", ["is empty", "at least one"]),
    "blank lines": ("\n  \n", "q.jsonl", ["is empty"]),
    "empty text file": ("\n", "q.txt", ["is empty"]),
    "latin-1": (b'{"text": "a"}\n{"text": "caf\xe9"}\n', "q.jsonl", ["line 2", "\\xe9", "iconv"]),
    "torn": ('{"text": "a"}\n{"text": "b', "q.jsonl", ["line 2", "cut off", "remove that line"]),
    "not json": ('{"text": "a"}\n{"text": b}\n', "q.jsonl", ["line 2", "not valid JSON", '{"text": b}']),
    "deep json": ('{"a":' + "[" * 100_000 + "\n", "q.jsonl", ["line 1", "not valid JSON"]),
    "prose named jsonl": ("Why?\n", "q.jsonl", ["line 1", "not valid JSON", "one object a line"]),
    "number as a row": ('{"text": "a"}\n5\n', "q.jsonl", ["line 2", "5 is not a JSON object", "write"]),
    "text in a list": ('["a"]', "q.json", ["row 1", "'a' is not a JSON object"]),
    "torn list": ('[{"text": "a"},\n{"text": "b"},\n', "q.json", ["line 2", "cut off"]),
    "bad list": ('[{"text": "a"},\n{"text" "b"}]', "q.json", ["line 2", "not valid JSON"]),
    "unknown file": ("Why?\n", "q.dat", ["line 1", "'Why?'", "name a file of one question a line .txt"]),
    "open quote": ('prompt\n"a\nb\n', "q.csv", ["line 3", "cut off", "quotes"]),
    "not gzip": ("a\n", "q.txt.gz", ["named .gz", "not gzip", "rename"]),
    "torn gzip": (gzip.compress(b'{"text": "a"}\n' * 99)[:-20], "q.jsonl.gz", ["damaged or cut off", "again"]),
    "broken gzip": (b"\x1f\x8b\x08 nonsense", "q.jsonl.gz", ["damaged or cut off", "again"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_one_line_that_says_what_to_do(write: Write, case: str) -> None:
    assert_refused(write, *BAD[case])
