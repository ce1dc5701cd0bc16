"""Selection of questions by `decontaminate`, `near_duplicates` and `limit`, and the record of dropped ones."""

import json
from pathlib import Path

import pytest

from mote.core.errors import UserError
from mote.core.recipe import Recipe
from mote.core.records import LeftOut
from mote.questions.load import select_questions

TEXTS = [
    "How do I pick the lock of a front door without a key?",
    "Why is the sky blue?",
    "how do i pick the lock of a front door without my key",
    "Please write a letter to my landlord that says the heating is broken since March",
    "Who wrote Hamlet?",
]


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"id": f"t{i}", "question": text}) + "\n" for i, text in enumerate(TEXTS))
    )
    rows = [
        {"id": "e0", "prompt": "why is the SKY blue"},
        {"id": "e1", "prompt": "Write a letter to my landlord that says the heating is loud"},
    ]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "train.jsonl"), str(tmp_path / "eval.jsonl")


def chosen(recipe: Recipe) -> tuple[list[str], list[tuple[str, str, str, str]]]:
    left: list[LeftOut] = []
    kept = [row.id for row in select_questions(recipe, left.append)]
    return kept, [(row.id, row.why, row.like, row.file) for row in left]


def test_without_filters_all_questions_are_selected(files: tuple[str, str]) -> None:
    assert chosen(Recipe(questions=files[0])) == (["t0", "t1", "t2", "t3", "t4"], [])


def test_a_left_out_question_names_the_row_it_resembles(files: tuple[str, str]) -> None:
    train, evaluation = files
    kept, out = chosen(Recipe(questions=train, decontaminate=(evaluation,), near_duplicates=0.7))
    assert kept == ["t0", "t4"]
    assert out == [
        ("t1", "evaluation", "e0", evaluation),
        ("t2", "near-duplicate", "t0", train),
        ("t3", "evaluation", "e1", evaluation),
    ]


def test_the_limit_counts_selected_questions(files: tuple[str, str]) -> None:
    train, evaluation = files
    kept, out = chosen(Recipe(questions=train, decontaminate=(evaluation,), limit=2))
    assert kept == ["t0", "t2"] and [row[0] for row in out] == ["t1"]


def test_no_remaining_question_is_an_error(files: tuple[str, str]) -> None:
    with pytest.raises(UserError, match=r"decontaminate: every question of .* overlaps with .*; give other questions"):
        chosen(Recipe(questions=files[1], decontaminate=files[1:]))


def test_a_missing_evaluation_file_is_an_error(files: tuple[str, str]) -> None:
    with pytest.raises(UserError, match=r"questions: /no\.csv does not exist"):
        chosen(Recipe(questions=files[0], decontaminate=("/no.csv",)))
