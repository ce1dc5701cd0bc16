"""Which judged answers stand in the page: all of a small evaluation, of a large one a sample that has something of all.

Prompts are drawn by the hash of their id, in turn from every task and there from every technique and type; so the same
evaluation always shows the same ones.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from mote.evals.results import EvalRow

PROMPTS = 400  # a page with more is slow to open on a phone
CHARACTERS = 4_000_000  # of all texts in the page

_Item = TypeVar("_Item")
Columns = Sequence[tuple[str, str]]


class Judged(BaseModel):
    """One prompt of a task with the judged answers of all systems and modes, None where one has not answered it."""

    model_config = ConfigDict(frozen=True)

    answers: tuple[EvalRow | None, ...]

    @property
    def first(self) -> EvalRow:
        """An answer to it: what all have in common is read from it."""
        return next(answer for answer in self.answers if answer is not None)


class Sample(BaseModel):
    """The judged answers of the page, and how many there are in all."""

    model_config = ConfigDict(frozen=True)

    shown: tuple[Judged, ...] = ()
    prompts: int = 0
    answers: int = 0

    @property
    def answers_shown(self) -> int:
        """Answers in the page."""
        return sum(answer is not None for prompt in self.shown for answer in prompt.answers)


def sample(rows: Sequence[EvalRow], columns: Columns, prompts: int = PROMPTS, characters: int = CHARACTERS) -> Sample:
    """The prompts of the page, in the order of the rows.

    Args:
        rows: All judged answers.
        columns: System and mode of each column.
        prompts: Prompts at most.
        characters: Characters of all texts at most.
    """
    place = {column: number for number, column in enumerate(columns)}
    found: dict[tuple[str, str, str], list[EvalRow | None]] = {}
    for row in rows:
        found.setdefault((row.task, row.technique, row.id), [None] * len(columns))[place[row.system, row.mode]] = row
    every = {key: Judged(answers=tuple(answers)) for key, answers in found.items()}
    chosen: set[tuple[str, str, str]] = set()
    left = characters
    for key in _in_turn(every)[:prompts]:
        left -= sum(_characters(answer) for answer in every[key].answers if answer is not None)
        if left < 0 and chosen:
            break
        chosen.add(key)
    shown = tuple(prompt for key, prompt in every.items() if key in chosen)
    return Sample(shown=shown, prompts=len(every), answers=len(rows))


def _in_turn(every: dict[tuple[str, str, str], Judged]) -> list[tuple[str, str, str]]:
    strata: dict[str, dict[tuple[str, str], list[tuple[str, str, str]]]] = {}
    for key in sorted(every, key=lambda key: hashlib.sha256("\0".join(key).encode()).digest()):
        first = every[key].first
        strata.setdefault(first.task, {}).setdefault((first.technique, first.type), []).append(key)
    return list(_interleaved([list(_interleaved(list(parts.values()))) for parts in strata.values()]))


def _interleaved(lists: Sequence[Sequence[_Item]]) -> Iterator[_Item]:
    """The first of each, the second of each, and so on."""
    return (item for item in chain.from_iterable(zip_longest(*lists)) if item is not None)


def _characters(row: EvalRow) -> int:
    return len(row.prompt) + len(row.answer) + sum(len(step.text) for step in row.steps)


def as_rows(judged: Sample) -> list[dict[str, Any]]:
    """What the page shows of each prompt; `judged.js.j2` knows these names."""
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
        for prompt in judged.shown
    ]
