"""Chooses the judged answers shown in the page: all of a small evaluation, a stratified sample of a large one.

Prompts are ordered by a hash of their id and taken in turn from every task, and within a task from every technique and
type, so the same evaluation always gives the same sample.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from typing import Any, TypeVar

from mote.core.records import Frozen
from mote.evals.results import EvalRow

PROMPTS = 400  # a page with more is slow to open on a phone
CHARACTERS = 4_000_000  # of all texts in the page

_Item = TypeVar("_Item")
PromptKey = tuple[str, str, str]  # task, technique, question id
Columns = Sequence[tuple[str, str]]


class JudgedPrompt(Frozen):
    """One prompt of a task with the judged answer of every system and mode, None if it was not answered."""

    answers: tuple[EvalRow | None, ...]

    @property
    def first(self) -> EvalRow:
        """Any of its answers, to read the fields that all share."""
        return next(answer for answer in self.answers if answer is not None)


class AnswerSample(Frozen):
    """The judged answers in the page, and the total numbers of prompts and answers."""

    shown: tuple[JudgedPrompt, ...] = ()
    prompts: int = 0
    answers: int = 0

    @property
    def answers_shown(self) -> int:
        """Number of answers in the page."""
        return sum(answer is not None for prompt in self.shown for answer in prompt.answers)


def draw_sample(
    rows: Sequence[EvalRow], columns: Columns, prompts: int = PROMPTS, characters: int = CHARACTERS
) -> AnswerSample:
    """Choose the prompts of the page; they keep the order of the rows.

    Args:
        rows: All judged answers.
        columns: System and mode of each column.
        prompts: Maximum number of prompts.
        characters: Maximum number of characters of all texts; at least one prompt is shown.
    """
    index = {column: number for number, column in enumerate(columns)}
    answers: dict[PromptKey, list[EvalRow | None]] = {}
    for row in rows:
        by_column = answers.setdefault((row.task, row.technique, row.id), [None] * len(columns))
        by_column[index[row.system, row.mode]] = row
    every = {key: JudgedPrompt(answers=tuple(by_column)) for key, by_column in answers.items()}
    chosen: set[PromptKey] = set()
    remaining = characters
    for key in _stratified_order(every)[:prompts]:
        remaining -= sum(_characters(answer) for answer in every[key].answers if answer is not None)
        if remaining < 0 and chosen:
            break
        chosen.add(key)
    shown = tuple(prompt for key, prompt in every.items() if key in chosen)
    return AnswerSample(shown=shown, prompts=len(every), answers=len(rows))


def _stratified_order(every: dict[PromptKey, JudgedPrompt]) -> list[PromptKey]:
    strata: dict[str, dict[tuple[str, str], list[PromptKey]]] = {}
    for key in sorted(every, key=lambda key: hashlib.sha256("\0".join(key).encode()).digest()):
        first = every[key].first
        strata.setdefault(first.task, {}).setdefault((first.technique, first.type), []).append(key)
    return list(_interleave([list(_interleave(list(parts.values()))) for parts in strata.values()]))


def _interleave(lists: Sequence[Sequence[_Item]]) -> Iterator[_Item]:
    """The first of each, the second of each, and so on."""
    return (item for item in chain.from_iterable(zip_longest(*lists)) if item is not None)


def _characters(row: EvalRow) -> int:
    return len(row.prompt) + len(row.answer) + sum(len(step.text) for step in row.steps)


def as_rows(sample: AnswerSample) -> list[dict[str, Any]]:
    """The fields that the page shows of each prompt; `judged.js.j2` uses these names."""
    return [
        {
            "task": prompt.first.task,
            "id": prompt.first.id,
            "technique": prompt.first.technique,
            "type": prompt.first.type,
            "kind": prompt.first.kind,
            "question": prompt.first.question,
            "prompt": prompt.first.prompt if prompt.first.prompt != prompt.first.question else "",
            "answers": [
                {
                    "column": number,
                    "label": answer.label,
                    "refusal": answer.refusal or "",
                    "judge": answer.judge,
                    "steps": [[step.name, step.text] for step in answer.steps],
                    "text": answer.answer,
                    "tokens": sum(answer.tokens.values()),
                    "finish": answer.finish,
                }
                for number, answer in enumerate(prompt.answers)
                if answer is not None
            ],
        }
        for prompt in sample.shown
    ]
