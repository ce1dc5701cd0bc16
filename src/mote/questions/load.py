"""Question files -> `Question` rows, streamed and without duplicates, and the selection that a recipe asks for.

This module knows nothing about models, tokens or prompts.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from mote.core.errors import UserError
from mote.core.recipe import Recipe
from mote.core.records import LeftOut, Question
from mote.questions.columns import short
from mote.questions.contamination import Evaluation
from mote.questions.duplicates import NearDuplicates, dialogue_of
from mote.questions.files import OWN, raw_rows
from mote.questions.formats import question_of


def select_questions(recipe: Recipe, leave_out: Callable[[LeftOut], None]) -> Iterator[Question]:
    """The first `limit` questions of the recipe's file that neither filter drops.

    Only hashes and ids of earlier questions stay in memory.

    Args:
        recipe: `questions`, `limit` and the filters `decontaminate` and `near_duplicates`.
        leave_out: Called with each dropped question.

    Raises:
        UserError: A file cannot be read, or no question is left.
    """
    max_chars = recipe.chains.max_question_chars
    evaluations = {file: Evaluation(iter_questions(file, None, max_chars)) for file in recipe.decontaminate}
    seen = NearDuplicates(recipe.near_duplicates) if recipe.near_duplicates is not None else None
    selected = 0
    for question in iter_questions(recipe.questions, None, max_chars):
        dropped = _contaminated(question, evaluations)
        if dropped is None and seen is not None:
            dropped = _near_duplicate(question, seen, recipe.questions)
        if dropped is not None:
            leave_out(dropped)
            continue
        yield question
        selected += 1
        if selected == recipe.limit:
            return
    if not selected:
        raise UserError(
            f"decontaminate: every question of {recipe.questions} overlaps with {list(recipe.decontaminate)}; "
            "give other questions or other files"
        )


def _contaminated(question: Question, evaluations: Mapping[str, Evaluation]) -> LeftOut | None:
    for file, evaluation in evaluations.items():
        row = evaluation.row_like(question)
        if row is not None:
            return LeftOut(**dict(question), why="evaluation", like=row, file=file)
    return None


def _near_duplicate(question: Question, seen: NearDuplicates, file: str) -> LeftOut | None:
    earlier = seen.add(question.id, dialogue_of(question))
    return None if earlier is None else LeftOut(**dict(question), why="near-duplicate", like=earlier, file=file)


def load_questions(source: str, limit: int | None, max_chars: int = 20_000) -> list[Question]:
    """`iter_questions` as a list."""
    return list(iter_questions(source, limit, max_chars))


def iter_questions(source: str, limit: int | None, max_chars: int = 20_000) -> Iterator[Question]:
    """Stream the questions of a source in its order, without duplicates.

    Two questions are duplicates if their messages agree after case-folding and collapsing whitespace; the first one is
    kept. With a `limit`, rows after the last question needed are not read (a JSON list is parsed whole).

    Dialogues are made regular (`mote.core.dialogue.regular_turns`), so the last user turn is the one to answer; the
    replies of preference rows and HH-RLHF are cut off. An HH-RLHF row without a user turn is skipped, any other one is
    an error.

    Args:
        source: A set of this package (`mote:train` and the others in `OWN`), a data set of the Hugging Face hub
            (`hub:OWNER/NAME[@SPLIT]`, by default the split `test`), or the path of a JSONL, JSON, CSV, TSV, Parquet or
            text file.
        limit: Largest number of questions; None for all.
        max_chars: Largest number of characters of a question's messages.

    Raises:
        UserError: The file cannot be read, a row is not a question, or two different questions share an id.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit: {limit} leaves no questions; use 1 or more, or leave it out")
    digests: set[bytes] = set()  # of the texts
    places: dict[str, str] = {}  # id -> place in the source
    for where, question in _read(source):
        length = sum(len(message.content) for message in question.messages)
        if length > max_chars:
            raise UserError(
                f"questions: {where}: the question {short(question.text)} has {length} characters, at most "
                f"{max_chars} are allowed; shorten it or raise chains.max_question_chars"
            )
        digest = hashlib.sha256(normalised(question).encode()).digest()[:16]
        if digest in digests:
            continue
        if question.id in places:
            raise UserError(
                f"questions: {where}: the id {short(question.id)} is that of another question, {places[question.id]}; "
                "give each question its own id"
            )
        digests.add(digest)
        places[question.id] = where
        yield question
        if len(places) == limit:
            break
    if not places:
        raise UserError(f"questions: {source} holds no questions; give a file with at least one")


def normalised(question: Question) -> str:
    """The text by which duplicates are found: case-folded, whitespace collapsed."""
    return "\n".join(f"{message.role}: {' '.join(message.content.casefold().split())}" for message in question.messages)


def _read(source: str) -> Iterator[tuple[str, Question]]:
    name = OWN.get(source) or Path(source).name
    for where, row in raw_rows(source):
        if question := question_of(row, name, where):
            yield where, question
