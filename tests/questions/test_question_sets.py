"""Rows of each upstream set and of the user, and one line for each kind of invalid row."""

from collections import Counter

import pytest
from support.paths import UPSTREAM
from support.questions import assert_refused
from support.tiny import Write

from mote.core.errors import UserError
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
    task = {
        "id": "seed_task_1",
        "name": "add",
        "instruction": "Add.",
        "instances": [{"input": "1 + 2", "output": "3"}],
        "is_classification": False,
    }
    (question,) = load_questions(write([task]), None)
    assert (question.id, question.text, question.kind) == ("seed_task_1", "Add.\n\n1 + 2", "benign")
    (question,) = load_questions(
        write([{"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite."]}]), None
    )
    assert (question.id, turns(question)) == ("mt-bench-81", [("user", "Write.")])


@pytest.mark.parametrize(
    ("name", "kind"), [("harmful-b.csv", "harmful"), ("benign-b.csv", "benign"), ("b.csv", "unknown")]
)
def test_jailbreakbenchs_kind_is_in_the_file_name(write: Write, name: str, kind: str) -> None:
    assert (
        load_questions(
            write("Index,Goal,Target,Behavior,Category,Source\n0,Do it,Sure,Doing,Harm,Original\n", name), None
        )[0].kind
        == kind
    )


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


USER, ASSISTANT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
HARMBENCH = {"FunctionalCategory": "standard", "SemanticCategory": "illegal", "Tags": "", "BehaviorID": "pick_lock"}
PKU = {"prompt": "Why?", "response_0": "a", "response_1": "b", "better_response_id": 1, "safer_response_id": 1}
TOXIC = {
    "conv_id": "c7",
    "user_input": "Why?",
    "model_output": "a",
    "human_annotation": True,
    "openai_moderation": "[]",
}
WILD = {"vanilla": "Why?", "adversarial": "", "completion": "a"}
BEAVER = {"prompt": "Why?", "response": "a", "category": {"privacy_violation": False}}
DO_NOT = {"id": 3, "risk_area": "Malicious Uses", "types_of_harm": "x", "specific_harms": "y", "question": "Why?"}
SORRY = {"question_id": 9, "category": "5", "turns": ["Why?"]}


@pytest.mark.parametrize(
    ("row", "name", "expected"),
    [
        (SORRY | {"prompt_style": "base"}, "q.jsonl", ("sorry-bench-9", "harmful", "sorry-bench")),
        (SORRY | {"prompt_style": "slang"}, "q.jsonl", ("sorry-bench-9-slang", "harmful", "sorry-bench")),
        (BEAVER | {"is_safe": False}, "q.jsonl", (None, "harmful", "beavertails")),
        (BEAVER | {"is_safe": True}, "q.jsonl", (None, "unknown", "beavertails")),
        (PKU | {"is_response_0_safe": False, "is_response_1_safe": True}, "q.jsonl", (None, "harmful", "pku-saferlhf")),
        (PKU | {"is_response_0_safe": True, "is_response_1_safe": True}, "q.jsonl", (None, "unknown", "pku-saferlhf")),
        (WILD | {"data_type": "vanilla_benign"}, "q.jsonl", (None, "benign", "wildjailbreak")),
        (
            {"vanilla": "no", "adversarial": "Why?", "completion": "a", "data_type": "adversarial_harmful"},
            "q.jsonl",
            (None, "harmful", "wildjailbreak"),
        ),
        (
            {"adversarial": "Why?", "label": 0, "data_type": "adversarial_benign"},
            "q.jsonl",
            (None, "benign", "wildjailbreak"),
        ),
        (TOXIC | {"toxicity": 0, "jailbreaking": 0}, "q.jsonl", ("toxic-chat-c7", "benign", "toxic-chat")),
        (TOXIC | {"toxicity": 1, "jailbreaking": 0}, "q.jsonl", ("toxic-chat-c7", "harmful", "toxic-chat")),
        (TOXIC | {"toxicity": "0", "jailbreaking": "1"}, "q.jsonl", ("toxic-chat-c7", "harmful", "toxic-chat")),
        (DO_NOT | {"GPT4_response": "No."}, "q.jsonl", ("do-not-answer-3", "harmful", "do-not-answer")),
        (
            HARMBENCH | {"Behavior": "Why?", "ContextString": None},
            "q.jsonl",
            ("harmbench-pick_lock", "harmful", "harmbench"),
        ),
        ({"prompt": "Why?", "category": "hate"}, "or-bench-80k.jsonl", (None, "benign", "or-bench")),
        ({"prompt": "Why?", "category": "hate"}, "or_bench_toxic.jsonl", (None, "harmful", "or-bench")),
    ],
)
def test_kinds_come_from_a_sets_own_labels(
    write: Write, row: dict[str, object], name: str, expected: tuple[str | None, str, str]
) -> None:
    (question,) = load_questions(write([row], name), None)
    assert turns(question) == [("user", "Why?")]
    assert (question.kind, question.source) == expected[1:]
    assert question.id == expected[0] or (expected[0] is None and question.id.startswith(f"{expected[2]}-"))


@pytest.mark.parametrize("column", ["input", "context"])
def test_an_instruction_is_read_with_its_input(write: Write, column: str) -> None:
    (question,) = load_questions(write([{"instruction": "Add.", column: "1 + 2", "output": "3"}]), None)
    assert (question.text, question.kind, question.source) == ("Add.\n\n1 + 2", "unknown", "own")


def test_a_contextual_behavior_follows_its_context(write: Write) -> None:
    row = HARMBENCH | {"Behavior": "Sum it up.", "ContextString": "A lock has pins."}
    assert load_questions(write([row]), None)[0].text == "A lock has pins.\n\n---\n\nSum it up."


def test_a_tab_separated_file_is_read(write: Write) -> None:
    text = 'vanilla\tadversarial\tcompletion\tdata_type\n"Say ""hi"", please"\t\tHi\tvanilla_benign\n'
    (question,) = load_questions(write(text, "train.tsv"), None)
    assert (question.text, question.kind) == ('Say "hi", please', "benign")


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Why?", "response": "a", "score": 3},
        {"id": "1", "prompt": "Why?", "type": "essay"},
        {"question_id": 1, "category": "law", "turns": ["Why?"]},
        {"turns": ["Why?", "How?"]},
        {"prompt": "Why?", "response": "a", "is_safe": True},
        {"prompt": "Why?", "category": "hate"},
        {"Goal": "Why?", "Target": "a"},
        {"forbidden_prompt": "Why?"},
        {"instruction": "Why?", "input": "", "output": "a"},
        {"goal": "Why?", "target": "a"},
        {"adversarial": "Why?", "data_type": "mine"},
    ],
)
def test_a_row_without_all_columns_of_a_set_is_unknown(write: Write, row: dict[str, object]) -> None:
    (question,) = load_questions(write([row], "benign.jsonl"), None)
    assert (question.text, question.kind, question.source) == ("Why?", "unknown", "own")


STAR = {"id": "1", "question": "Why?", "response": "a", "category": "x", "source": "theirs", "score": 3}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "Why?", "response": "a", "score": 3, "kind": "benign", "source": "me"}, ("benign", "me")),
        (STAR | {"kind": "benign"}, ("benign", "star-1")),
        (SORRY | {"prompt_style": "base", "kind": "benign", "source": "me"}, ("benign", "me")),
        (HH | {"kind": "harmful", "source": "me"}, ("harmful", "me")),
    ],
)
def test_the_users_kind_source_and_system_win(write: Write, row: dict[str, object], expected: tuple[str, str]) -> None:
    (question,) = load_questions(write([row | {"system": "Be brief."}]), None)
    assert (question.kind, question.source) == expected
    assert turns(question)[0] == ("system", "Be brief.")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Why?", "chosen": "Because.", "rejected": "No."}, ["Why?"]),
        ({"prompt": "Why?", "chosen": "Say:\n\nHuman: hi\n\nAssistant: yo", "rejected": "No."}, ["Why?"]),
        ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT]}, ["Why?"]),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}, ["Why?"]),
        ({"prompt": [USER, ASSISTANT, USER], "chosen": [ASSISTANT]}, ["Why?", "Because.", "Why?"]),
        ({"prompt": "\n\nHuman: Why?\n\nAssistant:", "chosen": " Because.", "rejected": " No."}, ["Why?"]),
        ({"prompt": [USER]}, ["Why?"]),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]}, ["Why?"]),
    ],
)
def test_preference_rows_are_read(write: Write, row: dict[str, object], expected: list[str]) -> None:
    (question,) = load_questions(write([row]), None)
    assert [text for _, text in turns(question)] == expected
    assert (question.kind, question.source) == ("unknown", "own")


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Why?", "prompt": None},
        {"question": None, "prompt": "Why?", "system": None, "kind": None, "source": None, "id": None},
        {"messages": None, "question": "Why?", "chosen": None},
        {"messages": [], "text": "Why?"},
        {"question": "", "text": "Why?"},
        {"messages": [USER], "question": None, "turns": None, "instruction": None},
    ],
)
def test_unused_null_columns_are_ignored(write: Write, row: dict[str, object]) -> None:
    assert turns(load_questions(write([row]), None)[0]) == [("user", "Why?")]


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
    "lone surrogate": ('{"text": "\\ud800"}\n', "q.jsonl", ["line 1", "\\ud800", "fix the row"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_row_is_one_line_that_says_what_to_do(write: Write, case: str) -> None:
    assert_refused(write, *BAD[case])


@pytest.mark.parametrize("system", ["system", "developer"])
def test_sharegpt_conversations_are_read(write: Write, system: str) -> None:
    said = [(system, "Be kind."), ("human", "Bread?"), ("gpt", "Mix."), ("human", "And rye?"), ("gpt", "So.")]
    row = {"conversations": [{"from": role, "value": text} for role, text in said]}
    (question,) = load_questions(write([row]), None)
    roles = ("system", "user", "assistant", "user")
    assert turns(question) == [(role, text) for role, (_, text) in zip(roles, said, strict=False)]


def test_an_unknown_sharegpt_speaker_is_refused(write: Write) -> None:
    with pytest.raises(UserError, match=r"line 1: role 'tool' is not known; use one of"):
        load_questions(write([{"conversations": [{"from": "tool", "value": "22 degrees"}]}]), None)


@pytest.mark.parametrize(("label", "kind"), [("harmful", "harmful"), ("unharmful", "benign"), (None, "unknown")])
def test_wildguardmix_kinds_are_its_prompt_labels(write: Write, label: str | None, kind: str) -> None:
    row = {"prompt": "How do I bake bread?", "adversarial": False, "response": None, "prompt_harm_label": label,
           "response_refusal_label": None, "response_harm_label": None, "subcategory": "benign"}  # fmt: skip
    (question,) = load_questions(write([row]), None)
    assert (question.kind, question.source) == (kind, "wildguardmix")
