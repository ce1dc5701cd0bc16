import subprocess
import sys
from pathlib import Path

import pytest

from mote.core.errors import MoteError, UserError
from mote.core.records import Message, Question, append_rows, cut_torn_line, folder_lock, read_rows, rewrite_rows


def question(name: str, text: str = "how?") -> Question:
    return Question(id=name, messages=(Message(role="user", content=text),), kind="benign", source="here")


def test_rows_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    rows = [question("1"), question("2", 'two\nlines, "quotes", \u2028 and 🙂')]
    append_rows(path, rows[:1])
    append_rows(path, rows[1:])
    assert read_rows(path, Question) == rows
    assert path.read_bytes().count(b"\n") == 2
    assert read_rows(tmp_path / "nothing.jsonl", Question) == []


@pytest.mark.parametrize("torn", [b"{", b'{"id": "2", "mess', b"x" * 200_000])
def test_a_torn_last_line_is_skipped_and_cut_off(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, [question("1")])
    with open(path, "ab") as sink:
        sink.write(torn)
    assert read_rows(path, Question) == [question("1")]
    append_rows(path, [question("2")])
    assert [row.id for row in read_rows(path, Question)] == ["1", "2"]


def test_a_file_that_is_one_torn_line_becomes_empty(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "1"')
    cut_torn_line(path)
    assert path.read_bytes() == b""


def test_an_invalid_row_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, [question("1")])
    with open(path, "ab") as sink:
        sink.write(b'{"id": "2"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl line 2: not a Question row \(messages: Field required\)"):
        read_rows(path, Question)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs Linux's /dev/full")
    (tmp_path / "rows.jsonl").symlink_to("/dev/full")
    with pytest.raises(MoteError, match="No space left on device"):
        append_rows(tmp_path / "rows.jsonl", [question("1")])


def test_rewriting_replaces_all_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, [question("1"), question("2")])
    rewrite_rows(path, [question("3")])
    assert read_rows(path, Question) == [question("3")]


def test_a_folder_lock_excludes_others_and_dies_with_its_process(tmp_path: Path) -> None:
    with folder_lock(tmp_path), pytest.raises(UserError, match="in use by another mote process"), folder_lock(tmp_path):
        pass
    hold = (
        "import sys, time; from pathlib import Path; from mote.core.records import folder_lock\n"
        "with folder_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="in use"), folder_lock(tmp_path):
        pass
    other.kill()
    other.wait()
    with folder_lock(tmp_path):
        pass
    with pytest.raises(UserError, match="cannot be used"), folder_lock(Path("/dev/null/folder")):
        pass


def test_a_failed_context_leaves_no_new_empty_folder(tmp_path: Path) -> None:
    def fail(folder: Path, *, writes: bool) -> None:
        with pytest.raises(ZeroDivisionError), folder_lock(folder):
            if writes:
                (folder / "rows.jsonl").touch()
            raise ZeroDivisionError

    fail(tmp_path / "runs" / "first", writes=False)
    assert list(tmp_path.iterdir()) == []
    fail(tmp_path / "runs" / "first", writes=True)
    fail(tmp_path / "runs" / "second", writes=False)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["first"]
    (tmp_path / "own").mkdir()
    fail(tmp_path / "own", writes=False)
    assert (tmp_path / "own").is_dir()
