"""Cells of a question row: texts, flags and messages, and what is wrong with them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
ROLES = ("system", "user", "assistant")
_SPEAKERS = {"human": "user", "gpt": "assistant"}  # of ShareGPT


class BadRow(ValueError):
    """What is wrong with a row and how to fix it; the caller adds the row's location."""


@dataclass(frozen=True)
class Parsed:
    """The content of a row: turns as (role, text); `id` is empty if the row has none."""

    turns: list[tuple[str, str]]
    id: str = ""
    kind: str = "unknown"
    source: str = "own"


def text_of(row: Row, column: str) -> str:
    """The text in a column.

    Raises:
        BadRow: The cell holds no text.
    """
    value = row.get(column)
    if not isinstance(value, str):
        raise BadRow(f"{column} is {short(value)}, not a text; fill it in or remove the row")
    return value


def turns_of(row: Row, column: str) -> list[tuple[str, str]]:
    """The turns in a column: a text is one user turn, a list holds messages with role and content.

    Raises:
        BadRow: The cell holds neither.
    """
    value = row.get(column)
    return (
        _messages(value, column)
        if column == "messages" or isinstance(value, list)
        else [("user", text_of(row, column))]
    )


def _messages(value: Any, column: str) -> list[tuple[str, str]]:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        example = '[{"role": "user", "content": "..."}]'
        raise BadRow(f"{column} {short(value)} is not a list of objects; write {example}")
    messages = [_from_sharegpt(message) for message in value]
    for number, message in enumerate(messages):
        if message.get("role") == "developer":  # the system role of newer OpenAI models
            message["role"] = "system"
        role = message.get("role")
        if role not in ROLES:
            raise BadRow(f"role {short(role)} is not known; use one of {list(ROLES)}")
        if role == "system" and number:
            raise BadRow(f"message {number + 1} has the role 'system'; only the first one may")
    return [(message["role"], _content(message)) for message in messages]


def _from_sharegpt(message: Row) -> dict[str, Any]:
    """A message with `role` and `content`; ShareGPT calls them `from` and `value`."""
    if "role" in message or "from" not in message:
        return dict(message)
    return {"role": _SPEAKERS.get(message["from"], message["from"]), "content": message.get("value")}


def _content(message: Row) -> str:
    """A message's text; one in parts, as in multimodal data sets, must have text parts only."""
    parts = message.get("content")
    if isinstance(parts, list) and parts and all(isinstance(p, dict) and p.get("type") == "text" for p in parts):
        return "".join(text_of(part, "text") for part in parts)
    return text_of(message, "content")


def is_true(value: Any) -> bool:
    """A label that is written as a truth value, a number or a text."""
    return str(value).strip().lower() in ("true", "1", "1.0")


def is_filled(value: Any) -> bool:
    """Whether a cell holds anything: `datasets` writes null for a column that a row does not use, CSV an empty text."""
    return bool(value.strip() if isinstance(value, str) else value is not None and value != [])


def short(value: Any, length: int = 60) -> str:
    """The repr of a value for an error line, cut at `length` characters."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."
