"""Imports of answers in upstream layouts, with rows written here."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from support.paths import UPSTREAM

from mote.chains.importing import import_chains
from mote.chains.stats import chain_stats
from mote.core.errors import UserError
from mote.core.records import ChainRow, read_rows
from mote.core.scheme import load_scheme

STAR = {
    "id": "7",
    "question": "How do I get into my neighbour's garage?",
    "response": "<think>\nThat would be a break-in.\n\nI should decline.\n</think>\n\nI can't help with that.",
    "category": ["Illegal"],
    "source": "hand",
    "score": {"Safety Compliance": 10},
}
HH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: How do I steal\n\na car?\n\nAssistant: You don't.\n\nOK?",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: How do I steal\n\na car?\n\nAssistant: Smash a window.",
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def bring(tmp_path: Path, rows: list[dict[str, Any]], form: str = "auto", **given: Any) -> list[ChainRow]:
    import_chains(write(tmp_path / "their-set.jsonl", rows), tmp_path / "out", form, **given)
    return read_rows(tmp_path / "out" / "chains.jsonl", ChainRow)


def steps(row: ChainRow) -> list[tuple[str, str]]:
    return [(step.name, step.text) for step in row.steps]


def turns(*contents: Any, **last: Any) -> dict[str, Any]:
    roles = ["user", "assistant"] * len(contents)
    messages: list[dict[str, Any]] = [
        {"role": role, "content": text} for role, text in zip(roles, contents, strict=False)
    ]
    messages[-1] |= last
    return {"messages": messages}


def test_star1_is_imported_from_its_upstream_list(tmp_path: Path) -> None:
    (tmp_path / "STAR-1.json").write_text(json.dumps([STAR], indent=4))
    made = import_chains(tmp_path / "STAR-1.json", tmp_path / "out")
    (row,) = read_rows(tmp_path / "out" / "chains.jsonl", ChainRow)
    assert (made.chains, made.reasoned, made.repeated, made.unanswered) == (1, 1, 0, 0)
    assert steps(row) == [
        ("analysis", "That would be a break-in.\n\nI should decline."),
        ("response", "I can't help with that."),
    ]
    assert (row.id, row.kind, row.source, row.model) == ("star-1-7", "harmful", "star-1", "teacher:star-1")
    assert row.accepted and row.checks == () and row.prompts == "" and row.tokens.made == 0


def test_an_imported_chain_is_one_of_the_scheme(tmp_path: Path) -> None:
    (row,) = bring(tmp_path, [STAR])
    assert tuple(step.name for step in row.steps) in load_scheme("safety").depths.values()


def test_a_gzipped_hh_rlhf_file_is_imported(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "test.jsonl.gz", "wt") as file:
        file.write(json.dumps(HH) + "\n" + json.dumps({**HH, "chosen": "\n\nHuman: Hi\n\nAssistant:"}) + "\n")
    made = import_chains(tmp_path / "test.jsonl.gz", tmp_path / "out")
    (row,) = read_rows(tmp_path / "out" / "chains.jsonl", ChainRow)
    assert steps(row) == [("response", "You don't.\n\nOK?")] and row.model == "human"
    assert [message.content for message in row.messages] == ["Hi", "Hello", "How do I steal\n\na car?"]
    assert (made.chains, made.reasoned, made.unanswered) == (1, 0, 1)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (turns("Why?", "Because."), [("response", "Because.")]),
        (turns("Why?", "<think>Hm.</think>Because."), [("analysis", "Hm."), ("response", "Because.")]),
        (turns("Why?", '<think signature="x">Hm.</think>Because.'), [("analysis", "Hm."), ("response", "Because.")]),
        (turns("Why?", "Hm.\n</think>\n\nBecause."), [("analysis", "Hm."), ("response", "Because.")]),  # R1's template
        (turns("Why?", "<think>\n\n</think>\n\nBecause."), [("response", "Because.")]),  # Qwen3, not thinking
        (turns("Why?", "Because.", reasoning_content="Hm."), [("analysis", "Hm."), ("response", "Because.")]),
        (turns("Why?", "Because.", reasoning_content=None), [("response", "Because.")]),
        (turns("Why?", "Because.", thinking="Hm."), [("analysis", "Hm."), ("response", "Because.")]),
    ],
)
def test_reasoning_is_read_from_any_known_field(
    row: dict[str, Any], expected: list[tuple[str, str]], tmp_path: Path
) -> None:
    (chain,) = bring(tmp_path, [row])
    assert steps(chain) == expected and chain.model == "teacher:their-set"


USER, ASSISTANT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
MORE = {"role": "assistant", "content": "And so.", "reasoning_content": "More?"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"chosen": "\n\nHuman: Why?\n\nAssistant: Because.\n\nAssistant: And so.", "rejected": ""},
            [("response", "Because.\n\nAnd so.")],
        ),
        ({"messages": [USER, ASSISTANT, MORE]}, [("analysis", "More?"), ("response", "Because.\n\nAnd so.")]),
        ({"messages": [USER, USER, ASSISTANT]}, [("response", "Because.")]),
        ({"prompt": "Why?", "chosen": "Because.", "rejected": "No."}, [("response", "Because.")]),
        ({"prompt": [USER], "chosen": [ASSISTANT, MORE]}, [("analysis", "More?"), ("response", "Because.\n\nAnd so.")]),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER]}, [("response", "Because.")]),
    ],
)
def test_consecutive_replies_are_joined(row: dict[str, Any], expected: list[tuple[str, str]], tmp_path: Path) -> None:
    (chain,) = bring(tmp_path, [row])
    assert steps(chain) == expected and chain.text.startswith("Why?")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (turns("Why?", "Close it by </think> here.", reasoning_content="Hm."), "Close it by </think> here."),
        (turns("Why?", "Close it by </think> here."), "Close it by </think> here."),
        (turns("Why?", "<think>a</think>b", reasoning_content="Hm."), "<think>a</think>b"),
    ],
)
def test_a_literal_end_of_thought_stays_in_the_answer(row: dict[str, Any], expected: str, tmp_path: Path) -> None:
    (chain,) = bring(tmp_path, [row])
    assert chain.steps[-1].text == expected


def test_thoughts_of_earlier_turns_are_removed(tmp_path: Path) -> None:
    (row,) = bring(tmp_path, [turns("Hi", "<think>Greet.</think>Hello!", "Why?", "<think>Hm.</think>Because.")])
    assert [message.content for message in row.messages] == ["Hi", "Hello!", "Why?"]


def test_skipped_rows_are_counted(tmp_path: Path) -> None:
    rows = [turns("A?", "a"), turns(" a? ", "again"), turns("B?"), turns("C?", "<think>endless"), turns("D?", " ")]
    made = import_chains(write(tmp_path / "x.jsonl", rows), tmp_path / "out")
    assert (made.chains, made.repeated, made.unanswered) == (1, 1, 3)
    assert made.summary().startswith("1 chains, 0 of them with reasoning; left out: 1 repeated questions, 3 rows")


def test_null_answers_are_skipped_and_null_columns_ignored(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {**turns("A?", "a"), "question": None, "response": None, "score": None, "chosen": None, "prompt": None},
        {"messages": None, "question": "B?", "response": None, "score": None},
    ]
    made = import_chains(write(tmp_path / "x.jsonl", rows), tmp_path / "out")
    assert (made.chains, made.unanswered) == (1, 1)
    made = import_chains(write(tmp_path / "y.jsonl", [{**STAR, "response": None}, STAR]), tmp_path / "out2", "star1")
    assert (made.chains, made.unanswered) == (1, 1)


def test_import_takes_a_writer_and_a_limit(tmp_path: Path) -> None:
    rows = bring(tmp_path, [turns("A?", "a"), turns("B?", "b"), turns("C?", "c")], writer="teacher:big", limit=2)
    assert [(row.text, row.model) for row in rows] == [("A?", "teacher:big"), ("B?", "teacher:big")]


@pytest.mark.parametrize(
    ("rows", "form", "message"),
    [
        ([{"instruction": "x", "output": "y"}], "auto", r"line 1: columns \['instruction', 'output'\] are of no known"),
        ([STAR], "messages", "line 1: no column 'messages', which the format messages has; give another --format"),
        ([STAR, HH], "auto", "line 2: no column 'response', which the format star1 has"),
        ([{"messages": "hello"}], "auto", "line 1: messages is not a list of objects with role and content"),
        ([{"messages": [{"role": "tool", "content": "x"}]}], "auto", "line 1: role 'tool' is not known"),
        ([{**STAR, "response": 5}], "star1", "line 1: response is 5, not a text"),
        ([turns("A?")], "auto", "holds no answered question"),
    ],
)
def test_a_failed_import_leaves_nothing(rows: list[dict[str, Any]], form: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        bring(tmp_path, rows, form)
    assert [path.name for path in tmp_path.iterdir()] == ["their-set.jsonl"]


def test_import_keeps_an_existing_folder(tmp_path: Path) -> None:
    bring(tmp_path, [STAR])
    before = (tmp_path / "out" / "chains.jsonl").read_bytes()
    with pytest.raises(UserError, match="exists and is not empty"):
        bring(tmp_path, [turns("A?", "a")])
    assert (tmp_path / "out" / "chains.jsonl").read_bytes() == before


@pytest.mark.skipif(not UPSTREAM.is_dir(), reason="the upstream files are not here")
@pytest.mark.parametrize(
    ("file", "chains", "reasoned"), [("star-1/STAR-1.json", 1000, 1000), ("hh-rlhf/harmless-base.jsonl.gz", 1153, 0)]
)
def test_upstream_files(file: str, chains: int, reasoned: int, tmp_path: Path) -> None:
    made = import_chains(UPSTREAM / file, tmp_path / "out")
    assert (made.chains, made.reasoned) == (chains, reasoned)
    assert chain_stats(tmp_path / "out", sample=10).accepted == chains
