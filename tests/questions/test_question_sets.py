"""Rows of each upstream set and of one's own, and one line for every way a row is bad."""

from collections import Counter

import pytest
from support.paths import UPSTREAM
from support.questions import assert_refused
from support.tiny import Write

from mote.core.records import Question
from mote.questions.load import load_questions

upstream = pytest.mark.skipif(not UPSTREAM.is_dir(), reason="the upstream files are not here")
HH = {
    "chosen": "\n\nHuman: hi\n\nAssistant: Hello!\n\nHuman: what is a\n\nb?\n\nAssistant: good",
    "rejected": "\n\nHuman: hi\n\nAssistant: Hello!\n\nHuman: what is a\n\nb?\n\nAssistant: bad",
}


def turns(question: Question) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in question.messages]


# --- upstream rows


@upstream
@pytest.mark.parametrize(
    ("file", "count", "kinds", "source"),
    [
        ("hh-rlhf/harmless-base.jsonl.gz", 1155, {"unknown": 1155}, "hh-rlhf"),
        ("xstest/xstest_prompts.csv", 225, {"benign": 123, "harmful": 102}, "xstest"),
        ("strongreject/strongreject_dataset.csv", 157, {"harmful": 157}, "strongreject"),
        ("jailbreakbench/harmful-behaviors.csv", 100, {"harmful": 100}, "jailbreakbench"),
        ("jailbreakbench/benign-behaviors.csv", 100, {"benign": 100}, "jailbreakbench"),
        ("self-instruct/seed_tasks.jsonl", 175, {"benign": 175}, "self-instruct"),
        ("mt-bench/question.jsonl", 80, {"benign": 80}, "mt-bench"),
        ("star-1/STAR-1.json", 1000, {"harmful": 1000}, "star-1"),
        ("capability/gsm8k.csv", 1000, {"unknown": 1000}, "own"),
    ],
)
def test_upstream_file(file: str, count: int, kinds: dict[str, int], source: str) -> None:
    questions = load_questions(str(UPSTREAM / file), None)
    assert len(questions) == count
    assert Counter(question.kind for question in questions) == kinds
    assert {question.source for question in questions} == {source}
    assert len({question.id for question in questions}) == count
    assert all(question.messages[-1].role == "user" for question in questions)


def test_hh_rlhf_is_the_dialogue_before_the_last_reply(write: Write) -> None:
    (question,) = load_questions(write([HH]), None)
    assert turns(question) == [("user", "hi"), ("assistant", "Hello!"), ("user", "what is a\n\nb?")]
    assert question.id.startswith("hh-") and len(question.id) == 15
    assert (question.kind, question.source) == ("unknown", "hh-rlhf")


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("\n\nHuman: a\n\nAssistant: b\n\nAssistant: c", [("user", "a")]),
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant: c", [("user", "a\n\nb")]),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: \n\nAssistant: c", [("user", "a")]),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: ", [("user", "a"), ("assistant", "b"), ("user", "c")]),
        ("\n\nHuman: a\n\nAssistant: \n\nHuman: c\n\nAssistant: d", [("user", "a\n\nc")]),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", [("user", "a"), ("assistant", "b"), ("user", "c")]),
        ("\n\nAssistant: x\n\nHuman: a\n\nAssistant: b", [("user", "a")]),
        ("Human: a\n\nAssistant: b", [("user", "a")]),
    ],
)
def test_unusual_hh_rlhf_rows(write: Write, chosen: str, expected: list[tuple[str, str]]) -> None:
    (question,) = load_questions(write([{"chosen": chosen, "rejected": ""}]), None)
    assert turns(question) == expected


def test_hh_rlhf_row_without_a_question_is_left_out(write: Write) -> None:
    rows = [{"chosen": "\n\nHuman: \n\nAssistant: hello", "rejected": ""}, HH]
    assert len(load_questions(write(rows), None)) == 1


def test_xstest(write: Write) -> None:
    rows = ['2,"How, pray, do I kill a process?",homonyms,safe', "4,Kill him,contrast_homonyms,unsafe"]
    file = write("\n".join(["id,prompt,type,label", *rows]), "x.csv")
    safe, contrast = load_questions(file, None)
    assert (safe.id, safe.text, safe.kind) == ("xstest-2", "How, pray, do I kill a process?", "benign")
    assert (contrast.kind, contrast.source) == ("harmful", "xstest")


def test_self_instruct_has_its_input_and_mt_bench_its_first_turn(write: Write) -> None:
    task = {"id": "seed_task_1", "instruction": "Add.", "instances": [{"input": "1 + 2", "output": "3"}]}
    (question,) = load_questions(write([task]), None)
    assert (question.id, question.text, question.kind) == ("seed_task_1", "Add.\n\n1 + 2", "benign")
    (question,) = load_questions(write([{"question_id": 81, "turns": ["Write.", "Rewrite."]}]), None)
    assert (question.id, turns(question)) == ("mt-bench-81", [("user", "Write.")])


@pytest.mark.parametrize(
    ("name", "kind"), [("harmful-b.csv", "harmful"), ("benign-b.csv", "benign"), ("b.csv", "unknown")]
)
def test_jailbreakbenchs_kind_is_in_the_file_name(write: Write, name: str, kind: str) -> None:
    assert load_questions(write("Index,Goal,Target\n0,Do it,Sure\n", name), None)[0].kind == kind


def test_question_rows_round_trip(write: Write) -> None:
    row = {
        "id": "a",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Why?"},
        ],
        "kind": "harmful",
        "source": "me",
    }
    (question,) = load_questions(write([row]), None)
    assert question == Question.model_validate(row)


def test_short_rows(write: Write) -> None:
    rows = [
        {"question": "a?"},
        {"prompt": "b?", "id": 7},
        {"text": "c?", "kind": "benign", "source": "s"},
        {"messages": [{"role": "user", "content": "d?"}, {"role": "assistant", "content": "cut off"}]},
    ]
    a, b, c, d = load_questions(write(rows), None)
    assert [question.text for question in (a, b, c, d)] == ["a?", "b?", "c?", "d?"]
    assert a.id.startswith("q-") and b.id == "7" and (c.kind, c.source) == ("benign", "s")


def test_ids_are_the_same_in_every_run(write: Write) -> None:
    assert load_questions(write([{"question": "Why?"}]), None)[0].id == "q-d60ffbcae186"


# --- bad rows


def message_user(content: str, role: str = "user") -> dict[str, object]:
    return {"messages": [{"role": role, "content": content}]}


BAD: dict[str, tuple[object, str, list[str]]] = {
    "no text": ([{"question": "a"}, {"question": "  "}], "q.jsonl", ["line 2", "no text", "remove the row"]),
    "null text": ([{"question": None}], "q.jsonl", ["line 1", "question is None", "remove the row"]),
    "number for text": ([{"prompt": 5}], "q.jsonl", ["line 1", "prompt is 5", "not a text"]),
    "short csv row": ("id,prompt\n1,a\n2\n", "q.csv", ["line 3", "prompt is None"]),
    "only an assistant": ([message_user("a", "assistant")], "q.jsonl", ["line 1", "no text to answer"]),
    "unknown columns": (
        [{"ask": "a", "b": 1}],
        "q.jsonl",
        ["line 1", "['ask', 'b']", "understood", "forbidden_prompt"],
    ),
    "unknown csv": ("ask,b\n1,2\n", "q.csv", ["line 2", "['ask', 'b']", "understood", "Goal"]),
    "wrong role": ([message_user("a", "human")], "q.jsonl", ["line 1", "'human'", "user"]),
    "late system": (
        [{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}],
        "q.jsonl",
        ["line 1", "message 2", "system"],
    ),
    "messages no list": ([{"messages": "a"}], "q.jsonl", ["line 1", "'a' is not a list", "write"]),
    "wrong kind": ([{"text": "a", "kind": "evil"}], "q.jsonl", ["line 1", "'evil'", "harmful", "benign"]),
    "turns no list": ([{"turns": []}], "q.jsonl", ["line 1", "turns [] is not a list"]),
    "hh without turns": ([{"chosen": "a"}], "q.jsonl", ["line 1", "Human:"]),
    "lone surrogate": ('{"text": "\\ud800"}\n', "q.jsonl", ["line 1", "\\ud800", "mend the row"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_row_is_one_line_that_says_what_to_do(write: Write, case: str) -> None:
    assert_refused(write, *BAD[case])
