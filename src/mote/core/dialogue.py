"""Normalises dialogues for chat templates: user and assistant alternate, and the user speaks first."""

import re
from collections.abc import Iterable, Sequence

_THOUGHT = re.compile(r"\A\s*<think\b[^>]*>.*?</think>", re.DOTALL)
# (opening, closing) of the reasoning that models put in front of their reply. The opening may be missing: some chat
# templates put it into the prompt.
_THOUGHTS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis", "<|channel|>final<|message|>"),
)
THOUGHT_OPENINGS = tuple(opening for opening, _ in _THOUGHTS)
Turn = tuple[str, str]  # role (`system`, `user`, `assistant`) and text


def join_turns(turns: Iterable[Turn]) -> list[Turn]:
    """The turns without blank ones, with consecutive turns of one role joined by an empty line."""
    joined: list[Turn] = []
    for role, text in turns:
        text = text.strip()
        if not text:
            continue
        if joined and joined[-1][0] == role:
            joined[-1] = (role, f"{joined[-1][1]}\n\n{text}")
        else:
            joined.append((role, text))
    return joined


def regular_turns(turns: Iterable[Turn]) -> list[Turn]:
    """A dialogue in which user and assistant alternate, from a user turn to a user turn.

    Turns are joined as by `join_turns`; those before the first and after the last user turn are dropped, except a
    system message at the start.

    Returns:
        The turns; empty if the user does not speak.
    """
    joined = join_turns(turns)
    system = joined[:1] if joined and joined[0][0] == "system" else []
    users = [index for index, (role, _) in enumerate(joined) if role == "user"]
    return [*system, *joined[users[0] : users[-1] + 1]] if users else []


def alternating_turns(turns: Sequence[Turn]) -> list[Turn]:
    """A dialogue that every chat template takes: as it is if user and assistant alternate, the user first.

    Otherwise it is made regular as by `regular_turns`; a system message after the start becomes part of the user turn
    beside it.

    Returns:
        The turns; empty if they are irregular and the user does not speak.
    """
    systems = next((index for index, (role, _) in enumerate(turns) if role != "system"), len(turns))
    roles = [role for role, _ in turns[systems:]]
    if systems <= 1 and all(role == ("user", "assistant")[index % 2] for index, role in enumerate(roles)):
        return list(turns)
    moved = [("user" if role == "system" else role, text) for role, text in turns[systems:]]
    return regular_turns([*turns[:systems], *moved])


def without_thought(text: str) -> str:
    """A reply without the thought that begins it; a later `</think>` is part of the reply."""
    return _THOUGHT.sub("", text)


def after_thought(text: str) -> str | None:
    """The text after a model's reasoning; None if the text ends inside it."""
    for opening, closing in _THOUGHTS:
        _, closed, rest = text.rpartition(closing)
        if closed:
            return rest
        if text.lstrip().startswith(opening):
            return None
    return text
