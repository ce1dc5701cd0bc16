"""Questions: the package's own sets, streaming, duplicates, and invalid files."""

from collections import Counter

import pytest
from support.questions import assert_refused
from support.tiny import Write

from mote.core.dialogue import regular_turns
from mote.core.errors import UserError
from mote.core.records import Question
from mote.core.scheme import load_scheme
from mote.questions.duplicates import similarity
from mote.questions.load import iter_questions, load_questions, normalised


def turns(question: Question) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in question.messages]


# --- the package's own sets


@pytest.fixture(scope="module")
def own() -> tuple[list[Question], list[Question]]:
    return load_questions("mote:train", None), load_questions("mote:test", None)


def test_own_sets_have_the_promised_kinds(own: tuple[list[Question], list[Question]]) -> None:
    train, test = own
    everything = train + test
    assert len(everything) >= 240 and len(test) >= 40
    assert len({question.id for question in everything}) == len(everything)
    assert len({normalised(question) for question in everything}) == len(everything)
    assert sum(len(question.messages) > 1 for question in everything) >= 24
    for part in own:
        kinds = Counter(question.kind for question in part)
        assert set(kinds) == {"harmful", "benign"} and min(kinds.values()) >= 0.3 * len(part)
        assert len({question.source for question in part if question.kind == "harmful"}) >= 12
    for question in everything:
        assert question.source.startswith("mote/")
        assert "<|" not in normalised(question)
        assert turns(question) == regular_turns(turns(question))


def test_word_problems_do_not_overlap() -> None:
    train, test = load_questions("mote:arithmetic", None), load_questions("mote:arithmetic-test", None)
    assert (len(train), len(test)) == (40, 12)
    shown = [example.question for example in load_scheme("plan-solve-verify").examples]
    assert max(similarity(one.text, other.text) for one in train for other in test) < 0.3
    assert max(similarity(one.text, other) for one in train + test for other in shown) < 0.3
    assert {question.kind for question in train + test} == {"benign"}


def test_questions_are_streamed(write: Write) -> None:
    """What is behind the last one that was asked for is not read: here it would be an error."""
    path = write('{"question": "one"}\n{"question": " ONE "}\n{"question": "two"}\n{"question": 3}\n')
    rows = iter_questions(path, None)
    assert [next(rows).text, next(rows).text] == ["one", "two"]
    with pytest.raises(UserError, match="line 4"):
        next(rows)


# --- duplicates and limits


def test_duplicates_are_dropped_before_the_limit_counts(write: Write) -> None:
    file = write([{"question": text} for text in ("One two", "ONE  two ", "three", "four")])
    assert [question.text for question in load_questions(file, 2)] == ["One two", "three"]
    assert len(load_questions(file, 99)) == 3


def test_limit_stops_reading(write: Write) -> None:
    file = write('{"question": "a"}\n{"question": "b"}\nnot json\n')
    assert len(load_questions(file, 2)) == 2
    with pytest.raises(UserError, match="line 3"):
        load_questions(file, 3)


# --- bad input: one line, with file, line, value and remedy


BAD: dict[str, tuple[object, str, list[str]]] = {
    "only a header": ("prompt,type\n", "q.csv", ["holds no questions"]),
    "empty list": ("[]", "q.json", ["holds no questions"]),
    "too long": (
        [{"question": "x" * 101}],
        "q.jsonl",
        ["line 1", "101", "100", "shorten", "chains.max_question_chars"],
    ),
    "same id": (
        [{"id": "x", "text": "a"}, {"id": "y", "text": "b"}, {"id": "x", "text": "c"}],
        "q.jsonl",
        ["line 3", "'x'", "q.jsonl line 1", "its own id"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_one_line_that_says_what_to_do(write: Write, case: str) -> None:
    assert_refused(write, *BAD[case])


def test_max_chars_is_inclusive(write: Write) -> None:
    assert load_questions(write([{"question": "x" * 100}]), None, max_chars=100)


def test_a_limit_below_one_is_refused(write: Write) -> None:
    with pytest.raises(UserError, match="limit: 0 leaves no questions; use 1 or more"):
        load_questions(write([{"question": "a"}]), 0)
