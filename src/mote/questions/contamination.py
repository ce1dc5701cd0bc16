"""Training questions that overlap with an evaluation file (decisions/0019).

As in appendix C of the GPT-3 paper (Brown et al. 2020, arXiv 2005.14165): a question is contaminated if it shares an
n-gram of words with a row of the evaluation file, ignoring case and punctuation; n is the 5th percentile of that file's
lengths in words, at least 8 and at most 13. Shorter rows are compared as a whole.
"""

from collections.abc import Iterable

from mote.core.records import Question
from mote.core.words import ngrams_of, words_of

SHORTEST_NGRAM = 8  # words
LONGEST_NGRAM = 13
_PERCENTILE = 0.05

_Turn = tuple[str, ...]  # words of a user turn


class Evaluation:
    """Index of an evaluation set: hashes of its n-grams, and its short rows.

    Args:
        rows: Its questions.
        n: Words of an n-gram; None for the 5th percentile of the rows' lengths, within 8 and 13.
    """

    def __init__(self, rows: Iterable[Question], n: int | None = None) -> None:
        asked = {row.id: _turns(row) for row in rows}
        self.n = n or _ngram_length([sum(map(len, turns)) for turns in asked.values()])
        self._ngrams: dict[int, str] = {}  # hash of an n-gram -> id of the row
        self._short: dict[tuple[_Turn, ...], str] = {}  # all turns of a row shorter than n -> its id
        for name, turns in asked.items():
            if hashes := self._hashes(turns):
                self._ngrams |= dict.fromkeys(hashes - self._ngrams.keys(), name)
            else:
                self._short.setdefault(turns, name)

    def row_like(self, question: Question) -> str | None:
        """Id of a row that shares an n-gram or, if it is short, all its words with the question; else None."""
        turns = _turns(question)
        for hashed in self._hashes(turns):
            if hashed in self._ngrams:
                return self._ngrams[hashed]
        return self._short.get(turns) or self._short.get(turns[-1:])

    def _hashes(self, turns: tuple[_Turn, ...]) -> set[int]:
        return {hash(ngram) for turn in turns for ngram in ngrams_of(list(turn), self.n)}


def _turns(question: Question) -> tuple[_Turn, ...]:
    """The user turns; assistants' replies are left out, they often repeat the same phrase."""
    return tuple(tuple(words_of(message.content)) for message in question.messages if message.role == "user")


def _ngram_length(lengths: list[int]) -> int:
    lengths = sorted(lengths)
    percentile = lengths[int(_PERCENTILE * len(lengths))] if lengths else LONGEST_NGRAM
    return min(max(percentile, SHORTEST_NGRAM), LONGEST_NGRAM)
