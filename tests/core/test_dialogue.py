from mote.core.dialogue import join_turns, regular_turns

SYSTEM, GREETING = ("system", "Be brief."), ("assistant", "Hello!")


def test_consecutive_turns_of_a_role_are_joined_and_blank_ones_dropped() -> None:
    turns = [("user", "Hi. "), ("assistant", " \n"), ("user", "How are you?"), GREETING, ("assistant", "Fine.")]
    assert join_turns(turns) == [("user", "Hi.\n\nHow are you?"), ("assistant", "Hello!\n\nFine.")]


def test_a_regular_dialogue_begins_and_ends_with_the_user() -> None:
    asked = ("user", "How do I store onions?")
    assert regular_turns([SYSTEM, GREETING, asked, ("assistant", "Dry.")]) == [SYSTEM, asked]
    assert regular_turns([asked, ("assistant", "Dry."), asked]) == [asked, ("assistant", "Dry."), asked]
    assert regular_turns([SYSTEM, GREETING]) == []
