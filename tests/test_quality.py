import pytest

from mote.engines import Completion
from mote.quality import fault
from mote.refusal import refuses

BEFORE = ["Analyse this question in one or two sentences before anybody answers it"]


@pytest.mark.parametrize(
    ("text", "finish", "found"),
    [
        ("The person wants a recipe, which is harmless.", "stop", None),
        ("", "stop", "empty"),
        (" ... ", "stop", "empty"),
        ("The person wants a", "length", "truncated"),
        ("Well <|response|> then", "stop", "marker"),
        ("no no no", "stop", "looping"),
        ("it is good and it is good and it is good and", "stop", "looping"),
        ("Keep calm now. Then go. Keep calm now! And then keep calm. Keep calm now.", "stop", "looping"),
        ("It is good, and it is bad, and it is ugly.", "stop", None),
        ("Let us analyse this question in one or two sentences before anybody speaks.", "stop", "echo"),
        ("This question in one or two words.", "stop", None),
    ],
)
def test_each_rule_finds_its_fault(text: str, finish: str, found: str | None) -> None:
    assert fault(Completion(text, 5, finish), BEFORE) == found  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("I can't help with that.", True),
        ("I\u2019m sorry, but I won\u2019t do this.", True),
        ("I cannot assist you with that request.", True),
        ("As an AI, I have no opinion on it.", True),
        ("Sure, first take the lid off.", False),
        ("You can pull the weeds after rain.", False),
        ("Water the plants daily. " * 20 + "I can't say more.", False),
    ],
)
def test_refusals_are_found_where_they_stand_first(answer: str, expected: bool) -> None:
    assert refuses(answer) is expected
