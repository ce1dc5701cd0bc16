"""Near-duplicate texts by MinHash with locality-sensitive hashing; only hashes stay in memory.

Similarity is the Jaccard index of the sets of character 5-grams, of which short questions have enough.
"""

from mote.core.records import ChainRow, Question

_GRAM = 5  # characters
_SEED = 42
_HASHES = 128  # standard error of an estimated similarity of 0.8: 0.035
_BANDS = 32  # of four hashes each: a pair of similarity 0.6 is compared with probability 0.99, of 0.8 almost surely


class NearDuplicates:
    """Index of the texts so far; about 3.4 KB per text, whatever its length.

    Args:
        threshold: Least estimated similarity of near-duplicates, 0.5 to 1.
    """

    def __init__(self, threshold: float) -> None:
        from rensa import RMinHashDeduplicator  # a compiled module, needed for this alone

        self._seen = RMinHashDeduplicator(threshold, _HASHES, use_lsh=True, num_bands=_BANDS, seed=_SEED)

    def add(self, name: str, text: str) -> str | None:
        """Add a text and return None; if it is a near-duplicate of an earlier one, only return that one's name."""
        from rensa import RMinHash

        sketch = RMinHash(_HASHES, _SEED)
        sketch.update(sorted(_grams(text)))
        if found := self._seen.get_duplicates(sketch):
            return str(min(found))
        self._seen.add(name, sketch)
        return None


def similarity(one: str, other: str) -> float:
    """The exact similarity that `NearDuplicates` estimates, 0 to 1."""
    left = _grams(one)
    right = _grams(other)
    return len(left & right) / len(left | right)


def dialogue_of(question: Question) -> str:
    """The text of a question that is compared."""
    return "\n".join(message.content for message in question.messages)


def text_of(chain: ChainRow) -> str:
    """The text of a chain that is compared: its steps."""
    return "\n".join(step.text for step in chain.steps)


def _grams(text: str) -> set[str]:
    text = " ".join(text.casefold().split())
    return {text[i : i + _GRAM] for i in range(max(1, len(text) - _GRAM + 1))}
