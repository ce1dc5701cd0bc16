"""Question files -> `Question` rows, one by one and without duplicates.

This module knows nothing of models, tokens or prompts.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from mote.core.errors import UserError
from mote.core.recipe import Recipe
from mote.core.records import LeftOut, Question
from mote.questions.contamination import Evaluation
from mote.questions.duplicates import NearDuplicates, dialogue_of
from mote.questions.files import OWN, raw_rows
from mote.questions.formats import question_of, short


def select_questions(recipe: Recipe, leave: Callable[[LeftOut], None]) -> Iterator[Question]:
    """The recipe's questions in the file's order, `limit` of them.

    Of what was read before, only hashes and ids stay in memory.

    Args:
        recipe: Names the file and what is to be left out.
        leave: Called with each question that is left out.

    Raises:
        UserError: A file cannot be read, or no question is left.
    """
    longest = recipe.chains.max_question_chars
    evaluations = [(file, Evaluation(iter_questions(file, None, longest))) for file in recipe.decontaminate]
    seen = NearDuplicates(recipe.near_duplicates) if recipe.near_duplicates is not None else None
    kept = 0
    for question in iter_questions(recipe.questions, None, longest):
        found = ((file, evaluation.row_like(question)) for file, evaluation in evaluations)
        file, row = next(((file, row) for file, row in found if row is not None), ("", None))
        if row is not None:
            leave(LeftOut(**dict(question), why="evaluation", like=row, file=file))
        elif seen is not None and (earlier := seen.add(question.id, dialogue_of(question))) is not None:
            leave(LeftOut(**dict(question), why="near-duplicate", like=earlier, file=recipe.questions))
        else:
            yield question
            kept += 1
            if kept == recipe.limit:
                return
    if not kept:
        raise UserError(
            f"decontaminate: every question of {recipe.questions} stands in {list(recipe.decontaminate)}; "
            "give other questions or other files"
        )


def load_questions(source: str, limit: int | None, max_chars: int = 20_000) -> list[Question]:
    """`iter_questions`, all of them."""
    return list(iter_questions(source, limit, max_chars))


def iter_questions(source: str, limit: int | None, max_chars: int = 20_000) -> Iterator[Question]:
    """Read questions one by one, without duplicates and in the file's order.

    Two questions are duplicates when their messages agree after case-folding and with whitespace collapsed; the first
    one stays. With a `limit`, nothing behind the last question that is needed is read (a JSON list is parsed whole).

    Every dialogue is tidied by the same rule: blank turns are dropped, neighbouring turns of one speaker are joined by
    an empty line, turns before the first and after the last user turn are cut off (a system message in front stays), so
    that the last user turn is what is to be answered. An HH-RLHF row that has no user turn is left out; it comes from
    `chosen`, with the reply cut off. Any other row without a user turn is an error.

    Args:
        source: A set of this package (`mote:train` and the others of `OWN`), `hub:OWNER/NAME[@SPLIT]` (a set of the
            Hugging Face hub with the upstream columns; its `test` part where no split is given), or the path of a
            JSONL, JSON, CSV or text file, gzipped or not.
        limit: How many questions to read at most; None for all.
        max_chars: Characters that all messages of a question may have together.

    Raises:
        UserError: The file cannot be read, a row is not a question, or two different questions share an id.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit: {limit} leaves no questions; use 1 or more, or leave it out")
    texts: set[bytes] = set()  # digests
    places: dict[str, str] = {}  # id -> where it was read
    for where, question in _read(source):
        length = sum(len(message.content) for message in question.messages)
        if length > max_chars:
            raise UserError(
                f"questions: {where}: the question {short(question.text)} has {length} characters, at most "
                f"{max_chars} are allowed; shorten it or raise chains.max_question_chars"
            )
        if (text := hashlib.sha256(normalised(question).encode()).digest()[:16]) in texts:
            continue
        if question.id in places:
            raise UserError(
                f"questions: {where}: the id {short(question.id)} is that of another question, {places[question.id]}; "
                "give each question an id of its own"
            )
        texts.add(text)
        places[question.id] = where
        yield question
        if len(places) == limit:
            break
    if not places:
        raise UserError(f"questions: {source} holds no questions; give a file with at least one")


def normalised(question: Question) -> str:
    """The text of a dialogue as duplicates are compared: case-folded, whitespace collapsed."""
    return "\n".join(f"{message.role}: {' '.join(message.content.casefold().split())}" for message in question.messages)


def _read(source: str) -> Iterator[tuple[str, Question]]:
    name = OWN.get(source) or Path(source).name
    for where, row in raw_rows(source):
        if question := question_of(row, name, where):
            yield where, question
