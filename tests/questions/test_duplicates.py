"""Near-duplicates by MinHash beside the exact similarity."""

import random

import pytest

from mote.core.records import ChainRow, ChainTokens, Message, Question, StepText
from mote.questions.duplicates import NearDuplicates, dialogue_of, similarity, text_of
from mote.questions.load import load_questions

LOCK = "How do I pick the lock of a front door without a key?"


def test_similarity_is_that_of_the_texts() -> None:
    assert similarity(LOCK, LOCK.upper().replace(" ", "  ")) == 1.0
    assert similarity("abcdef", "bcdefg") == pytest.approx(1 / 3)  # abcde bcdef cdefg: one of three
    assert similarity("no", "yes") == 0.0


def test_a_rewording_names_the_first_text() -> None:
    seen = NearDuplicates(0.7)
    assert seen.add("first", LOCK) is None
    assert seen.add("other", "Why is the sky blue in the morning and red at night?") is None
    assert seen.add("same", LOCK) == "first"
    assert seen.add("near", "how do i pick the lock of a front door without my key") == "first"
    assert seen.add("far", "How do I paint the frame of a front door without a brush?") is None


def test_estimated_and_exact_similarity_agree() -> None:
    """Texts of every similarity: what is clearly above the threshold is found, what is clearly below is not."""
    draw = random.Random(0)
    words = [word for question in load_questions("mote:train", 60) for word in question.text.split()]
    checked = [0, 0]
    for changed in range(20):
        for _ in range(10):
            one = [draw.choice(words) for _ in range(40)]
            other = [draw.choice(words) if draw.random() < changed / 40 else word for word in one]
            real = similarity(" ".join(one), " ".join(other))
            seen = NearDuplicates(0.8)
            seen.add("one", " ".join(one))
            found = seen.add("other", " ".join(other)) is not None
            if abs(real - 0.8) > 0.12:  # more than three standard errors
                assert found == (real > 0.8), real
                checked[found] += 1
    assert min(checked) > 20


def test_own_sets_share_no_near_duplicates() -> None:
    train, test = ([dialogue_of(row) for row in load_questions(name, None)] for name in ("mote:train", "mote:test"))
    assert max(similarity(one, other) for one in train for other in test) < 0.3


def test_the_whole_dialogue_and_chain_are_compared() -> None:
    messages = (
        Message(role="user", content="a"),
        Message(role="assistant", content="b"),
        Message(role="user", content="c"),
    )
    question = Question(id="q", messages=messages)
    assert dialogue_of(question) == "a\nb\nc"
    chain = ChainRow(
        **dict(question), steps=(StepText(name="analysis", text="d"), StepText(name="response", text="e")), safe=True,
        checks=(), model="m", prompts="", seed=0, tokens=ChainTokens(made=0, kept=0), seconds=0,
    )  # fmt: skip
    assert text_of(chain) == "d\ne"
