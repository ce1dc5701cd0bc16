from mote.core.dialogue import alternating_turns, join_turns, regular_turns

SYSTEM, GREETING = ("system", "Be brief."), ("assistant", "Hello!")


def test_consecutive_turns_are_joined_and_blank_ones_dropped() -> None:
    turns = [("user", "Hi. "), ("assistant", " \n"), ("user", "How are you?"), GREETING, ("assistant", "Fine.")]
    assert join_turns(turns) == [("user", "Hi.\n\nHow are you?"), ("assistant", "Hello!\n\nFine.")]


def test_a_regular_dialogue_begins_and_ends_with_the_user() -> None:
    asked = ("user", "How do I store onions?")
    assert regular_turns([SYSTEM, GREETING, asked, ("assistant", "Dry.")]) == [SYSTEM, asked]
    assert regular_turns([asked, ("assistant", "Dry."), asked]) == [asked, ("assistant", "Dry."), asked]
    assert regular_turns([SYSTEM, GREETING]) == []


def test_alternating_dialogue_is_left_as_it_is() -> None:
    dialogue = [SYSTEM, ("user", " Hi.\n"), ("assistant", ""), ("user", "")]
    assert alternating_turns(dialogue) == dialogue
    assert alternating_turns([]) == []


def test_irregular_dialogue_alternates_afterwards() -> None:
    asked = ("user", "How do I store onions?")
    assert alternating_turns([GREETING, asked]) == [asked]
    assert alternating_turns([SYSTEM, SYSTEM, ("user", "Hi."), asked]) == [
        ("system", "Be brief.\n\nBe brief."), ("user", "Hi.\n\nHow do I store onions?")
    ]  # fmt: skip
    assert alternating_turns([("user", "Hi."), GREETING, SYSTEM, asked]) == [
        ("user", "Hi."), GREETING, ("user", "Be brief.\n\nHow do I store onions?")
    ]  # fmt: skip
    assert alternating_turns([GREETING, ("user", " ")]) == []
