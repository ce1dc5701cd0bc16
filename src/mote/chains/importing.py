"""Existing answers -> chains: a teacher's (STAR-1, any `messages` file) and preferred ones (HH-RLHF, TRL).

An imported chain has at most two steps: the reasoning, whatever its length, is the analysis, and what the user would
read is the response. It counts as safe because its source says so; nothing is checked here.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mote.core.dialogue import join_turns
from mote.core.errors import UserError
from mote.core.files import atomic_folder, check_new
from mote.core.records import ChainRow, ChainTokens, Frozen, StepText, append_rows
from mote.questions.columns import Row, is_filled, short
from mote.questions.files import rows_of
from mote.questions.formats import question_of
from mote.questions.load import normalised
from mote.questions.upstream import hh_turns

FORMATS = ("star1", "messages", "hh-rlhf", "preference")
_COLUMN = {"star1": "response", "messages": "messages", "hh-rlhf": "chosen", "preference": "chosen"}  # of the answer
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # of servers and of chat templates
# A thought that begins the text. R1's template writes `<think>` in the prompt, so that the text has only the end tag,
# alone on its line.
_THOUGHT = re.compile(r"\A\s*(?:<think\b[^>]*>(.*?)</think>|(.*?)^[ \t]*</think>[ \t]*$)\s*", re.DOTALL | re.MULTILINE)
_BATCH = 500  # rows per write


class Imported(Frozen):
    """Counts of an import.

    Attributes:
        chains: Imported rows.
        reasoned: Those with reasoning.
        repeated: Rows skipped because their question is a duplicate.
        unanswered: Rows skipped because they have no answer.
    """

    chains: int
    reasoned: int
    repeated: int
    unanswered: int

    def summary(self) -> str:
        """The counts as one line."""
        return (
            f"{self.chains} chains, {self.reasoned} of them with reasoning; left out: {self.repeated} repeated "
            f"questions, {self.unanswered} rows without an answer"
        )


def import_chains(
    file: Path, out: Path, form: str = "auto", writer: str | None = None, limit: int | None = None
) -> Imported:
    """Write `OUT/chains.jsonl` from a file of answers; after an error no folder remains.

    Args:
        file: Rows in one of `FORMATS`, as JSONL, JSON, CSV, TSV or Parquet.
        out: Folder to create.
        form: One of `FORMATS`; `auto` detects it from the columns of the first row.
        writer: Author of the chains; None for the format's default.
        limit: Largest number of rows to read.

    Raises:
        UserError: The folder exists, the file cannot be read, or a row is not of the format.
    """
    check_new(out)
    counts: Counter[str] = Counter()
    seen: set[int] = set()
    with atomic_folder(out) as folder:
        batch: list[ChainRow] = []
        for number, (where, row) in enumerate(rows_of(file)):
            if number == limit:
                break
            form = _format(row, where) if form == "auto" else form
            chain = _chain(row, form, file.name, where, writer)
            if chain is None:
                counts["unanswered"] += 1
            elif (text := hash(normalised(chain))) in seen:
                counts["repeated"] += 1
            else:
                seen.add(text)
                counts["chains"] += 1
                counts["reasoned"] += len(chain.steps) > 1
                batch.append(chain)
            if len(batch) == _BATCH:
                append_rows(folder / "chains.jsonl", batch)
                batch = []
        append_rows(folder / "chains.jsonl", batch)
        if not counts["chains"]:
            raise UserError(f"import: {file} holds no answered question; see `mote chains import --help` for formats")
    return Imported(**{name: counts[name] for name in Imported.model_fields})


def _format(row: Row, where: str) -> str:
    if {"question", "response", "score"} <= row.keys() and is_filled(row["response"]):
        return "star1"
    if is_filled(row.get("messages")):
        return "messages"
    chosen = row.get("chosen")
    if isinstance(chosen, str) and not is_filled(row.get("prompt")):
        return "hh-rlhf"
    if is_filled(chosen):
        return "preference"
    raise UserError(
        f"import: {where}: columns {sorted(map(str, row))[:8]} are of no known format; use one of {FORMATS}"
    )


def _chain(row: Row, form: str, filename: str, where: str, writer: str | None) -> ChainRow | None:
    """A row's chain; None if it holds no answer or a thought is not closed."""
    column = _COLUMN[form]
    if column not in row:
        raise UserError(f"import: {where}: no column '{column}', which the format {form} has; give another --format")
    if not is_filled(row[column]):
        return None
    replies = _replies(row, form, where)
    for name in ("messages", "prompt", "chosen"):
        if isinstance(row.get(name), list):
            row = {**row, name: _without_thoughts(row[name])}
    question = question_of(row, filename, where)
    reasoning = "\n\n".join(thought.strip() for thought, _ in replies if thought.strip())
    answer = "\n\n".join(text.strip() for _, text in replies if text.strip())
    if question is None or not answer:
        return None
    steps = (("analysis", reasoning), ("response", answer))
    teacher = f"teacher:{filename.split('.')[0]}"
    author = {"star1": "teacher:star-1", "messages": teacher, "hh-rlhf": "human", "preference": teacher}[form]
    return ChainRow(
        **dict(question),
        steps=tuple(StepText(name=name, text=text) for name, text in steps if text),
        safe=True,
        checks=(),
        model=writer or author,
        prompts="",
        seed=0,
        tokens=ChainTokens(made=0, kept=0),
        seconds=0,
    )


def _replies(row: Row, form: str, where: str) -> list[tuple[str, str]]:
    """(Reasoning, text) of each assistant turn after the last user turn."""
    value = row[_COLUMN[form]]
    if form in ("star1", "hh-rlhf") and not isinstance(value, str):
        raise UserError(f"import: {where}: {_COLUMN[form]} is {short(value)}, not a text; fix the row")
    if form == "hh-rlhf":
        turns = join_turns(hh_turns(value))
        return [("", turns[-1][1])] if turns and turns[-1][0] == "assistant" else []
    if form in ("star1", "preference") and isinstance(value, str):
        return [_split(value)]
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise UserError(f"import: {where}: {_COLUMN[form]} is not a list of objects with role and content; fix the row")
    last_asked = max((number for number, turn in enumerate(value) if turn.get("role") != "assistant"), default=-1)
    return [_thought_and_text(turn) for turn in value[last_asked + 1 :]]


def _thought_and_text(turn: Mapping[str, Any]) -> tuple[str, str]:
    content = turn["content"] if isinstance(turn.get("content"), str) else ""
    given = next((turn[key] for key in _REASONING_KEYS if isinstance(turn.get(key), str)), "")
    return (given, content) if given.strip() else _split(content)


def _without_thoughts(turns: Sequence[Any]) -> list[Any]:
    """The turns without the assistant's thoughts in their content, as chat templates render earlier turns."""
    return [
        {**turn, "content": _thought_and_text(turn)[1]}
        if isinstance(turn, dict) and turn.get("role") == "assistant" and isinstance(turn.get("content"), str)
        else turn
        for turn in turns
    ]


def _split(text: str) -> tuple[str, str]:
    """`<think>reasoning</think>answer` in two; a thought without an end has no answer."""
    if thought := _THOUGHT.match(text):
        return thought[1] or thought[2] or "", text[thought.end() :]
    return (text, "") if text.lstrip().startswith(("<think>", "<think ")) else ("", text)
