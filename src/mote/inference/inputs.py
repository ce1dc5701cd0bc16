"""What `Model.answer` accepts: texts, message lists and `Question`s."""

import hashlib
from collections.abc import Sequence
from typing import cast

from mote.core.dialogue import alternating_turns
from mote.core.errors import UserError
from mote.core.records import Message, Question

Input = str | Sequence[dict[str, str]] | Question


def as_questions(given: Input | Sequence[Input]) -> tuple[list[Question], bool]:
    """One input or a list of them as `Question`s.

    Returns:
        The questions, and whether a single input was given rather than a list.

    Raises:
        UserError: As `as_question`.
    """
    if isinstance(given, str | Question) or (given and isinstance(given[0], dict)):
        return [as_question(cast(Input, given))], True
    return [as_question(cast(Input, one)) for one in given], False


def as_question(given: Input) -> Question:
    """A text or a message list as a `Question`; turns that do not alternate are joined (`alternating_turns`).

    Raises:
        UserError: The dialogue does not end with a user turn, or no user turn has text.
    """
    if isinstance(given, Question):
        return given
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else list(given)
    try:
        turns = tuple(Message.model_validate(message) for message in messages)
    except ValueError as error:
        raise UserError("answer: a message has a `role` (system, user, assistant) and a `content`") from error
    if not turns or turns[-1].role != "user":
        raise UserError("answer: the last message must be the user's")
    regular = alternating_turns([(turn.role, turn.content) for turn in turns])
    if not regular:
        raise UserError("answer: no user message has any text; give one")
    turns = tuple(Message.model_validate({"role": role, "content": content}) for role, content in regular)
    digest = hashlib.sha256(repr([(turn.role, turn.content) for turn in turns]).encode()).hexdigest()
    return Question(id=f"asked-{digest[:12]}", messages=turns)
