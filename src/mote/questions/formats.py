"""A row of any set that is understood -> a `Question`: upstream files as they are, and the user's own rows.

Which set a row belongs to is told from its columns. This module knows nothing of files.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from mote.core.dialogue import regular_turns
from mote.core.errors import UserError, first_line
from mote.core.records import Kind, Message, Question

Row = Mapping[str, Any]

ROLES = ("system", "user", "assistant")
_TEXT_KEYS = ("question", "prompt", "text")
UNDERSTOOD = (
    "messages; question, prompt or text; chosen (HH-RLHF); prompt and type (XSTest); forbidden_prompt (StrongREJECT); "
    "Goal (JailbreakBench); instruction and instances (self-instruct); turns (MT-Bench)"
)
_XSTEST_TYPES = {
    *("homonyms", "figurative_language", "safe_targets", "safe_contexts", "definitions", "historical_events"),
    *("real_group_nons_discr", "nons_group_real_discr", "discr", "privacy_public", "privacy_fictional", "privacy"),
}
_TURN = re.compile(r"\n\n(Human|Assistant):")


class _BadRow(ValueError):
    """What is wrong with a row and how to mend it; the caller adds where it is."""


@dataclass(frozen=True)
class _Parsed:
    """A row of any set; `id` is empty where the set has none."""

    messages: list[tuple[str, str]]  # role, text
    id: str = ""
    kind: str = "unknown"
    source: str = ""


def question_of(row: Row, filename: str, where: str) -> Question | None:
    """The question of a row of any set that is understood; None for a dialogue of HH-RLHF in which no user speaks.

    Raises:
        UserError: It holds no question; names the place and the remedy.
    """
    try:
        return _question(row, filename)
    except _BadRow as error:
        raise UserError(f"questions: {where}: {error}") from error


def is_known(columns: Iterable[str]) -> bool:
    """Whether rows with these columns belong to a set that is understood."""
    return _set_of(dict.fromkeys(columns, "")) is not None


def _question(row: Row, filename: str) -> Question | None:
    read = _set_of(row)
    if read is None:
        columns = [column for column in row if column is not None]
        raise _BadRow(f"unknown columns {short(columns)}; understood are {UNDERSTOOD}")
    parsed = read(row, filename)
    messages = regular_turns(parsed.messages)
    if not messages:
        if read is _hh_rlhf:
            return None
        raise _BadRow(f"{short(dict(row))} has no text to answer; fill it in or remove the row")
    if parsed.kind not in get_args(Kind):
        raise _BadRow(f"kind {short(parsed.kind)} is not known; use one of {list(get_args(Kind))}")
    try:
        made = tuple(Message.model_validate({"role": role, "content": text}) for role, text in messages)
        name = parsed.id or _id(made, parsed.source)
        question = Question.model_validate({"id": name, "messages": made, "kind": parsed.kind, "source": parsed.source})
        question.model_dump_json()  # halves of surrogate pairs cannot be written again
        return question
    except ValueError as error:
        raise _BadRow(f"{short(messages[-1][1])} is not a question ({first_line(error)}); mend the row") from error


def _set_of(row: Row) -> Callable[[Row, str], _Parsed] | None:
    """The reader of the set a row belongs to, told by its columns."""
    if "messages" in row:
        return _own
    if "chosen" in row:
        return _hh_rlhf
    if "forbidden_prompt" in row:
        return _strongreject
    if "Goal" in row:
        return _jailbreakbench
    if "prompt" in row and str(row.get("type")).removeprefix("contrast_") in _XSTEST_TYPES:
        return _xstest
    if {"question", "response", "score"} <= set(row):
        return _star1
    if {"instruction", "instances"} <= set(row):
        return _self_instruct
    if "turns" in row:
        return _mt_bench
    return _own if any(key in row for key in _TEXT_KEYS) else None


def _own(row: Row, filename: str) -> _Parsed:
    """Rows of the Question contract, or any with a text; `id`, `kind`, `source` and `system` are optional."""
    system = [("system", _text(row, "system"))] if row.get("system") else []
    messages = _messages(row["messages"]) if "messages" in row else [("user", _first_text(row))]
    name = row.get("id")
    return _Parsed(
        system + messages,
        id="" if name is None else str(name),
        kind=_text(row, "kind") if row.get("kind") else "unknown",
        source=_text(row, "source") if row.get("source") else "own",
    )


def _first_text(row: Row) -> str:
    return _text(row, next(key for key in _TEXT_KEYS if key in row))


def _messages(value: Any) -> list[tuple[str, str]]:
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise _BadRow(f'messages {short(value)} is not a list of objects; write [{{"role": "user", "content": "..."}}]')
    for number, turn in enumerate(value):
        role = turn.get("role")
        if role not in ROLES:
            raise _BadRow(f"role {short(role)} is not known; use one of {list(ROLES)}")
        if role == "system" and number:
            raise _BadRow(f"message {number + 1} has the role 'system'; only the first one may")
    return [(turn["role"], _text(turn, "content")) for turn in value]


def _hh_rlhf(row: Row, filename: str) -> _Parsed:
    """`chosen` without its last reply; what is behind the last user turn is cut off when the row is tidied."""
    turns = hh_turns(_text(row, "chosen"))
    if not turns:
        raise _BadRow(f"chosen {short(row['chosen'])} has no '\\n\\nHuman:' turn; is the file HH-RLHF's?")
    return _Parsed(turns, source="hh-rlhf")


def hh_turns(text: str) -> list[tuple[str, str]]:
    """A dialogue of HH-RLHF as (role, text)."""
    _, *parts = _TURN.split("\n\n" + text.lstrip())
    roles = ("user" if speaker == "Human" else "assistant" for speaker in parts[::2])
    return list(zip(roles, parts[1::2], strict=True))


def _strongreject(row: Row, filename: str) -> _Parsed:
    return _Parsed([("user", _text(row, "forbidden_prompt"))], kind="harmful", source="strongreject")


def _jailbreakbench(row: Row, filename: str) -> _Parsed:
    """The two files have the same columns, so only their names tell harmful from benign."""
    kind = next((kind for kind in ("benign", "harmful") if kind in filename.lower()), "unknown")
    return _Parsed([("user", _text(row, "Goal"))], kind=kind, source="jailbreakbench")


def _xstest(row: Row, filename: str) -> _Parsed:
    """The contrasts are the unsafe twins of the safe prompts."""
    kind = "harmful" if row["type"].startswith("contrast_") else "benign"
    name = f"xstest-{row['id']}" if row.get("id") else ""
    return _Parsed([("user", _text(row, "prompt"))], id=name, kind=kind, source="xstest")


def _star1(row: Row, filename: str) -> _Parsed:
    """STAR-1 is harmful throughout; its benign companion set has the same columns and says so in its name."""
    kind = "benign" if "benign" in filename.lower() else "harmful"
    name = f"star-1-{row['id']}" if row.get("id") else ""
    return _Parsed([("user", _text(row, "question"))], id=name, kind=kind, source="star-1")


def _self_instruct(row: Row, filename: str) -> _Parsed:
    """The instruction with the input of its first instance, where it has one."""
    instances = row.get("instances")
    first = instances[0] if isinstance(instances, list) and instances else {}
    given = first.get("input") if isinstance(first, dict) else None
    text = _text(row, "instruction") + (f"\n\n{given}" if given else "")
    return _Parsed([("user", text)], id=str(row.get("id") or ""), kind="benign", source="self-instruct")


def _mt_bench(row: Row, filename: str) -> _Parsed:
    """The first turn alone: the second one asks about an answer that is not there yet."""
    turns = row["turns"]
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
        raise _BadRow(f"turns {short(turns)} is not a list of texts; the first one is the question")
    name = f"mt-bench-{row['question_id']}" if row.get("question_id") else ""
    return _Parsed([("user", turns[0])], id=name, kind="benign", source="mt-bench")


def _text(row: Row, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise _BadRow(f"{key} is {short(value)}, not a text; fill it in or remove the row")
    return value


def _id(messages: tuple[Message, ...], source: str) -> str:
    """`hh-` and the like, and 12 hex digits of the messages' sha256."""
    prefix = {"hh-rlhf": "hh", "own": "q"}.get(source, source)
    content = json.dumps([[message.role, message.content] for message in messages])
    return f"{prefix}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def short(value: Any, length: int = 60) -> str:
    """A value in an error: as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."
