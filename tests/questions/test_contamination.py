"""Overlap with an evaluation set, by n-grams of words and, for short rows, as a whole."""

import pytest
from support.paths import UPSTREAM

from mote.core.records import Message, Question
from mote.questions.contamination import Evaluation
from mote.questions.load import load_questions

LONG = "Write a letter to my landlord that says the heating has been broken since the first of March"


def ask(name: str, *turns: str) -> Question:
    roles = ["user", "assistant"] * len(turns)
    return Question.model_validate(
        {"id": name, "messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]}
    )


def split(questions: list[Question], rows: list[Question]) -> tuple[list[Question], list[tuple[Question, str]]]:
    """The clean questions, and the others with the id of the row they resemble."""
    evaluation = Evaluation(rows)
    found = [(question, evaluation.row_like(question)) for question in questions]
    return [q for q, row in found if row is None], [(q, row) for q, row in found if row is not None]


def test_a_shared_ngram_is_found_anywhere() -> None:
    evaluation = Evaluation([ask("e1", LONG), ask("e2", "Kill a Python process")], n=8)
    inside = "My flat is cold. Please WRITE a letter, to my landlord: that says the heating is fine."
    assert evaluation.row_like(ask("t", inside)) == "e1"
    assert evaluation.row_like(ask("t", "Hello", "Hello! What is it?", inside)) == "e1"
    assert evaluation.row_like(ask("t", inside, "Done.", "Thank you")) == "e1"
    assert evaluation.row_like(ask("t", "Write a letter to my landlord, who says it is cold")) is None  # seven words
    assert evaluation.row_like(ask("t", "Hello", inside, "And then?")) is None  # an assistant's words


def test_a_short_row_matches_as_a_whole_only() -> None:
    evaluation = Evaluation([ask("short", "How do I kill a Python process?"), ask("hi", "hi", "Hello!", "why?")], n=8)
    assert evaluation.row_like(ask("t", "how do i  KILL a python process")) == "short"
    assert evaluation.row_like(ask("t", "Hello", "Yes?", "How do I kill a Python process?")) == "short"
    assert evaluation.row_like(ask("t", "How do I kill a Python process on Windows?")) is None
    assert evaluation.row_like(ask("t", "hi", "Good morning.", "Why?")) == "hi"
    assert evaluation.row_like(ask("t", "why?")) is None and evaluation.row_like(ask("t", "hi")) is None


@pytest.mark.parametrize(("words", "n"), [(3, 8), (8, 8), (10, 10), (13, 13), (40, 13)])
def test_the_ngram_length_follows_the_sets_lengths(words: int, n: int) -> None:
    rows = [ask(str(i), " ".join(f"w{i}x{j}" for j in range(words))) for i in range(19)] + [ask("long", "word " * 90)]
    assert Evaluation(rows).n == n


def test_split_keeps_order_and_names_the_row() -> None:
    rows = [ask("a", "Why is the sky blue?"), ask("b", f"Dear model! {LONG}."), ask("c", "Who wrote Hamlet?")]
    kept, refused = split(rows, [ask("e", LONG)])
    assert [row.id for row in kept] == ["a", "c"]
    assert [(row.id, like) for row, like in refused] == [("b", "e")]


def test_own_sets_do_not_overlap() -> None:
    _, refused = split(load_questions("mote:train", None), load_questions("mote:test", None))
    assert not refused


@pytest.mark.skipif(not UPSTREAM.is_dir(), reason="the upstream files are not here")
def test_upstream_sets_overlap_as_known() -> None:
    """STAR-1 took some of its questions from HH-RLHF; a set overlaps with itself entirely."""
    star = load_questions(str(UPSTREAM / "star-1/STAR-1.json"), None)
    hh = load_questions(str(UPSTREAM / "hh-rlhf/harmless-base.jsonl.gz"), None)
    _, refused = split(star, hh)
    texts = {row.id: row.text for row in hh}
    assert 5 < len(refused) < 30 and any(row.text == texts[like] for row, like in refused)
    assert not split(star, star)[0]


def test_system_messages_are_not_compared() -> None:
    told = Question(
        id="s", messages=(Message(role="system", content=LONG), Message(role="user", content="hello there"))
    )
    assert Evaluation([ask("e", LONG)], n=8).row_like(told) is None
