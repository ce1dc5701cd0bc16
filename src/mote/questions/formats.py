"""A row of a question file -> a `Question`: the user's own rows, preference rows, and public data sets.

What the row itself says (`kind`, `source`, `system`) wins over what its data set implies. This module knows nothing
about files.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import get_args

from mote.core.dialogue import Turn, regular_turns
from mote.core.errors import UserError, first_line
from mote.core.records import Kind, Message, Question
from mote.questions.columns import BadRow, Parsed, Row, is_filled, short, text_of, turns_of
from mote.questions.upstream import SETS, first_turn, hh_turns, instruction_text, upstream_set

# Of a row's dialogue, in the order in which they are looked for.
_COLUMNS = ("messages", "conversations", "question", "prompt", "text", "chosen", "instruction", "turns")
# Of sets whose other columns were cut.
_CUT_COLUMNS = ("forbidden_prompt", "Goal", "goal", "Behavior", "user_input", "adversarial")
UNDERSTOOD = (
    "messages or conversations; question, prompt or text; prompt, chosen and rejected (preferences); instruction and "
    "input; turns; and "
    f"the columns of {', '.join(dict.fromkeys(one.name for one in SETS))} (forbidden_prompt, Goal, ...)"
)
_ID_PREFIXES = {"hh-rlhf": "hh", "own": "q"}


def question_of(row: Row, filename: str, where: str) -> Question | None:
    """The question of a row; None for a dialogue of HH-RLHF without a user turn.

    Raises:
        UserError: It holds no question; names the place and the remedy.
    """
    try:
        return _question(row, filename)
    except BadRow as error:
        raise UserError(f"questions: {where}: {error}") from error


def is_known(columns: Iterable[str]) -> bool:
    """Whether rows with these columns can be read."""
    return not {*_COLUMNS, *_CUT_COLUMNS}.isdisjoint(columns)


def _question(row: Row, filename: str) -> Question | None:
    parsed = _parse(row, filename)
    turns = regular_turns(parsed.turns)
    if not turns:
        if parsed.source == "hh-rlhf":
            return None
        raise BadRow(f"{short(dict(row))} has no text to answer; fill it in or remove the row")
    if parsed.kind not in get_args(Kind):
        raise BadRow(f"kind {short(parsed.kind)} is not known; use one of {list(get_args(Kind))}")
    try:
        messages = tuple(Message.model_validate({"role": role, "content": text}) for role, text in turns)
        name = parsed.id or _id(messages, parsed.source)
        question = Question.model_validate(
            {"id": name, "messages": messages, "kind": parsed.kind, "source": parsed.source}
        )
        question.model_dump_json()  # fails on lone surrogates
        return question
    except ValueError as error:
        raise BadRow(f"{short(turns[-1][1])} is not a question ({first_line(error)}); fix the row") from error


def _parse(row: Row, filename: str) -> Parsed:
    known = upstream_set(row, filename)
    parsed = known.read(row, filename) if known else Parsed(_own_turns(row), id=_own_id(row))
    system = [("system", text_of(row, "system"))] if is_filled(row.get("system")) else []
    kind = text_of(row, "kind") if is_filled(row.get("kind")) else parsed.kind
    source = known.name if known else parsed.source
    if is_filled(row.get("source")) and not (known and known.has_source):
        source = text_of(row, "source")
    return Parsed(system + parsed.turns, id=parsed.id, kind=kind, source=source)


def _own_turns(row: Row) -> list[Turn]:
    """The dialogue of a row that belongs to no known set: of the first filled column."""
    columns = [column for column in (*_COLUMNS, *_CUT_COLUMNS) if column in row]
    if not columns:
        unknown = [column for column in row if column is not None]
        raise BadRow(f"unknown columns {short(unknown)}; understood are {UNDERSTOOD}")
    filled = [column for column in columns if is_filled(row[column])]
    column = filled[0] if filled else columns[0]
    if column == "instruction":
        return [("user", instruction_text(row))]
    if column == "turns":
        return [("user", first_turn(row))]
    if column == "chosen" and isinstance(row[column], str):
        turns = hh_turns(row[column])
        if not turns:
            raise BadRow(f"chosen {short(row[column])} has no '\\n\\nHuman:' turn and the row no prompt; add a prompt")
        return turns
    if column == "prompt" and isinstance(row[column], str) and row[column].lstrip().startswith("Human:"):
        return hh_turns(row[column])  # as TRL writes HH-RLHF
    return turns_of(row, column)


def _own_id(row: Row) -> str:
    return str(row["id"]) if is_filled(row.get("id")) else ""


def _id(messages: tuple[Message, ...], source: str) -> str:
    """A prefix for the source and 12 hex digits of the messages' sha256."""
    content = json.dumps([[message.role, message.content] for message in messages])
    return f"{_ID_PREFIXES.get(source, source)}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
