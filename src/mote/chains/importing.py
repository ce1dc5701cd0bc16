"""Other people's answers -> chains: a teacher's (STAR-1 and any `messages` file) and people's (HH-RLHF).

A chain that somebody else wrote has at most two steps: their reasoning, whatever its length, is the analysis, and what
the user would read is the response. It counts as safe, since its source says so; nothing was checked here.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mote.core.errors import UserError
from mote.core.files import atomic_folder, check_new
from mote.core.records import ChainRow, ChainTokens, Frozen, StepText, append_rows
from mote.questions.files import rows_of
from mote.questions.formats import Row, hh_turns, question_of
from mote.questions.load import normalised

FORMATS = ("star1", "messages", "hh-rlhf")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # of servers and of chat templates
_THOUGHT = re.compile(r"\A\s*(?:<think>)?(.*?)</think>\s*", re.DOTALL)
_BATCH = 500  # rows that are written at once


class Imported(Frozen):
    """How many rows became chains, and why the others did not."""

    chains: int
    reasoned: int
    repeated: int
    unanswered: int

    def summary(self) -> str:
        """The counts in a line."""
        return (
            f"{self.chains} chains, {self.reasoned} of them with reasoning; left out: {self.repeated} repeated "
            f"questions, {self.unanswered} rows without an answer"
        )


def import_chains(
    file: Path, out: Path, form: str = "auto", writer: str | None = None, limit: int | None = None
) -> Imported:
    """Make `OUT/chains.jsonl` of a file of answers; the folder is there as a whole or not at all.

    Args:
        file: In one of `FORMATS`, as JSONL, JSON or CSV, gzipped or not.
        out: Folder to make.
        form: One of `FORMATS`; `auto` tells it from the columns of the first row.
        writer: Who wrote the chains; None for what the format says.
        limit: Rows to read at most.

    Raises:
        UserError: The folder is there, the file cannot be read, or a row is not of the format.
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
    if {"question", "response", "score"} <= row.keys():
        return "star1"
    if "messages" in row:
        return "messages"
    if "chosen" in row:
        return "hh-rlhf"
    raise UserError(
        f"import: {where}: columns {sorted(map(str, row))[:8]} are of no known format; use one of {FORMATS}"
    )


def _chain(row: Row, form: str, filename: str, where: str, writer: str | None) -> ChainRow | None:
    """A row's chain; None where nobody answers, or where only a thought was begun."""
    column = {"star1": "response", "messages": "messages", "hh-rlhf": "chosen"}[form]
    if column not in row:
        raise UserError(f"import: {where}: no column '{column}', which the format {form} has; give another --format")
    if form == "messages":
        row = {**row, "messages": list(_without_thoughts(row["messages"], where))}
    question = question_of(row, filename, where)
    reasoning, answer = _answer(row, form, where)
    if question is None or not answer.strip():
        return None
    steps = (("analysis", reasoning), ("response", answer))
    author = {"star1": "teacher:star-1", "messages": f"teacher:{filename.split('.')[0]}", "hh-rlhf": "human"}[form]
    return ChainRow(
        **dict(question),
        steps=tuple(StepText(name=name, text=text.strip()) for name, text in steps if text.strip()),
        safe=True,
        checks=(),
        model=writer or author,
        prompts="",
        seed=0,
        tokens=ChainTokens(made=0, kept=0),
        seconds=0,
    )


def _answer(row: Row, form: str, where: str) -> tuple[str, str]:
    """Reasoning and answer of the last reply; empty where there is none."""
    if form == "star1":
        return _split(str(row["response"]))
    if form == "hh-rlhf":
        turns = hh_turns(str(row["chosen"]))
        return "", turns[-1][1] if turns and turns[-1][0] == "assistant" else ""
    last = row["messages"][-1] if row["messages"] else {}
    if last.get("role") != "assistant":
        return "", ""
    given = next((last[key] for key in _REASONING_KEYS if isinstance(last.get(key), str)), "")
    reasoning, answer = _split(last["content"] if isinstance(last.get("content"), str) else "")
    return given or reasoning, answer


def _without_thoughts(messages: Any, where: str) -> Iterator[Mapping[str, Any]]:
    """The turns, those of the assistant but the last without what it thought: a chat template drops that too."""
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise UserError(f"import: {where}: messages is not a list of objects with role and content; mend the row")
    for turn in messages[:-1]:
        thought = turn.get("role") == "assistant" and isinstance(turn.get("content"), str)
        yield {**turn, "content": _split(turn["content"])[1]} if thought else turn
    yield from messages[-1:]


def _split(text: str) -> tuple[str, str]:
    """`<think>reasoning</think>answer` in two; a thought that does not end has no answer."""
    if thought := _THOUGHT.match(text):
        return thought[1], text[thought.end() :]
    return (text, "") if text.lstrip().startswith("<think>") else ("", text)
