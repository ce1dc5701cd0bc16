"""Accepted chains as a folder for `datasets`, its card, and its upload to a fake hub."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.chains import made
from support.hub_server import Hub, environment

from mote.chains.importing import import_chains
from mote.chains.publishing import export_dataset
from mote.core.errors import UserError
from mote.core.records import ChainRow, append_rows, read_rows

ROWS = [
    made("one", "How do I clean it?", response="Use soap."),
    made("two", "How do I hide it?", kind="harmful", analysis="Why hide it?", guidance="Ask.", response="What is it?"),
    made("three", "How?", safe=False, response="So."),
    made("four", "What?", rejected="response: echo", response="What?"),
]
MAIN = "from mote.cli import main; main()"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    append_rows(tmp_path / "run" / "chains.jsonl", ROWS)
    return tmp_path / "run"


def test_datasets_reads_an_exported_folder(folder: Path, tmp_path: Path) -> None:
    from datasets import load_dataset

    export_dataset(folder, tmp_path / "out", "cc-by-4.0")
    found = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert list(found) == ["train"] and found["train"]["id"][:] == ["one", "two"]
    one, two = found["train"]
    assert one["messages"] == [
        {"role": "user", "content": "How do I clean it?", "reasoning_content": None},
        {"role": "assistant", "content": "Use soap.", "reasoning_content": None},
    ]
    assert two["messages"][-1]["reasoning_content"] == "Why hide it?\n\nAsk."
    assert [step["name"] for step in two["steps"]] == ["analysis", "guidance", "response"]
    assert two["checks"] == [{"depth": "direct", "answer": "What is it?", "safe": True, "score": 0.9}]
    assert (two["kind"], two["source"], two["model"], two["prompts"], two["seed"]) == ("harmful", "hand", "m", "p", 0)


def test_the_card(folder: Path, tmp_path: Path) -> None:
    export_dataset(folder, tmp_path / "out", "cc-by-4.0")
    _, head, text = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    meta = yaml.safe_load(head)
    assert meta["license"] == "cc-by-4.0" and meta["size_categories"] == ["n<1K"]
    assert meta["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*.parquet"}]
    assert "2 questions, each with" in text and "2 more" in text and "4 chains: 2 accepted" in text
    assert 'load_dataset("out", split="train")' in text


def test_an_exported_folder_can_be_imported(folder: Path, tmp_path: Path) -> None:
    """The reasoning goes where other people's readers look for it."""
    from datasets import load_dataset

    export_dataset(folder, tmp_path / "out")
    rows = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    rows.to_json(tmp_path / "rows.jsonl")
    import_chains(tmp_path / "rows.jsonl", tmp_path / "back")
    one, two = read_rows(tmp_path / "back" / "chains.jsonl", ChainRow)
    assert [step.text for step in one.steps] == ["Use soap."] and one.id == "one" and two.kind == "harmful"
    assert [step.text for step in two.steps] == ["Why hide it?\n\nAsk.", "What is it?"]


def test_nothing_to_export(tmp_path: Path) -> None:
    append_rows(tmp_path / "chains.jsonl", ROWS[2:])
    with pytest.raises(UserError, match=r"none of the 2 chains of .* is accepted; nothing to export"):
        export_dataset(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def push(hub: Hub, folder: Path, tmp_path: Path, token: str, repository: str = "user/name") -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "chains", "export", folder, "--out", tmp_path / "out", "--push", repository],
        env={**environment(hub, tmp_path / "home"), "HF_TOKEN": token}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_the_folder_is_pushed_unchanged(hub: Hub, folder: Path, tmp_path: Path) -> None:
    code, printed = push(hub, folder, tmp_path, "secret")
    assert code == 0, printed
    assert f"{hub.address}/user/name/commit/1" in printed and hub.commits == 1
    data = "data/train-00000-of-00001.parquet"
    assert hub.files[f"user/name/{data}"] == (tmp_path / "out" / data).read_bytes() and hub.large == {data}
    assert b'load_dataset("user/name"' in hub.files["user/name/README.md"]
    assert not [request for request in hub.refused if not request.startswith(("HEAD", "GET"))]


@pytest.mark.parametrize(
    ("token", "repository", "code", "message"),
    [
        ("wrong", "user/name", 1, "push: cannot upload to user/name (Client error '401"),
        ("secret", "user/na me/x", 2, "push: 'user/na me/x' is not a repository ("),
    ],
)
def test_a_refused_push_is_one_line_and_keeps_the_folder(
    hub: Hub, folder: Path, tmp_path: Path, token: str, repository: str, code: int, message: str
) -> None:
    ended, printed = push(hub, folder, tmp_path, token, repository)
    assert ended == code and message in printed and "Traceback" not in printed, printed
    assert (tmp_path / "out" / "README.md").exists() and not hub.files
