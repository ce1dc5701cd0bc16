"""Questions to train on that also stand in an evaluation file (decisions/0019).

As in appendix C of the GPT-3 paper (Brown et al. 2020, arXiv 2005.14165): a question is contaminated when it shares a
run of n words with a row of the evaluation file, case and punctuation aside; n is the 5th percentile of that file's
lengths in words, 8 at least and 13 at most. Rows that are shorter are compared as a whole.
"""

from collections.abc import Iterable

from mote.core.records import Question
from mote.core.words import ngrams_of, words_of

SHORTEST_RUN, LONGEST_RUN = 8, 13  # words
_PERCENTILE = 0.05

_Turn = tuple[str, ...]  # the words of a user's turn


class Evaluation:
    """An evaluation set as what may not be trained on: hashes of its runs of words, and its short rows.

    Args:
        rows: Its questions.
        run: Words of a run; None for the 5th percentile of the rows' lengths, within 8 and 13.
    """

    def __init__(self, rows: Iterable[Question], run: int | None = None) -> None:
        asked = {row.id: _turns(row) for row in rows}
        self.run = run or _usual_run([sum(map(len, turns)) for turns in asked.values()])
        self._runs: dict[int, str] = {}  # hash of a run -> id of the row
        self._short: dict[tuple[_Turn, ...], str] = {}  # all turns of a row that is too short for a run -> its id
        for name, turns in asked.items():
            if runs := self._hashed(turns):
                self._runs |= dict.fromkeys(runs - self._runs.keys(), name)
            else:
                self._short.setdefault(turns, name)

    def row_like(self, question: Question) -> str | None:
        """Id of a row that the question shares a run with or, of a short row, all words; None where there is none."""
        turns = _turns(question)
        for hashed in self._hashed(turns):
            if hashed in self._runs:
                return self._runs[hashed]
        return self._short.get(turns) or self._short.get(turns[-1:])

    def _hashed(self, turns: tuple[_Turn, ...]) -> set[int]:
        return {hash(run) for turn in turns for run in ngrams_of(list(turn), self.run)}


def split_contaminated(
    questions: Iterable[Question], evaluation: Iterable[Question], run: int | None = None
) -> tuple[list[Question], list[tuple[Question, str]]]:
    """The questions that may be trained on, and the others, each with the id of the evaluation row it resembles."""
    index, kept, refused = Evaluation(evaluation, run), [], []
    for question in questions:
        if (row := index.row_like(question)) is None:
            kept.append(question)
        else:
            refused.append((question, row))
    return kept, refused


def _turns(question: Question) -> tuple[_Turn, ...]:
    """The user's turns: what assistants said in a dialogue is often the same phrase."""
    return tuple(tuple(words_of(message.content)) for message in question.messages if message.role == "user")


def _usual_run(lengths: list[int]) -> int:
    lengths = sorted(lengths)
    typical = lengths[int(_PERCENTILE * len(lengths))] if lengths else LONGEST_RUN
    return min(max(typical, SHORTEST_RUN), LONGEST_RUN)
