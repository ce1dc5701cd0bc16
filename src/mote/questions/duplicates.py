"""Texts that are nearly the same: MinHash with locality-sensitive hashing, so that memory holds hashes only.

Similarity is that of Jaccard between the sets of character 5-grams, which short questions still have enough of.
"""

from mote.core.records import ChainRow, Question

_GRAM = 5  # characters
_SEED = 42
_HASHES = 128  # standard error of an estimated similarity of 0.8: 0.035
_BANDS = 32  # of four hashes: a pair as similar as 0.6 is looked at in 99 of 100 cases, one of 0.8 practically always


class NearDuplicates:
    """What was seen so far; about 3.4 KB a text, whatever its length.

    Args:
        threshold: Estimated similarity from which on two texts are near-duplicates, 0.5 to 1.
    """

    def __init__(self, threshold: float) -> None:
        from rensa import RMinHashDeduplicator  # compiled, and needed only where duplicates are looked for

        self._seen = RMinHashDeduplicator(threshold, _HASHES, use_lsh=True, num_bands=_BANDS, seed=_SEED)

    def add(self, name: str, text: str) -> str | None:
        """Remember a text unless it nearly repeats one that was added before; then the name of that one."""
        from rensa import RMinHash

        sketch = RMinHash(_HASHES, _SEED)
        sketch.update(sorted(_grams(text)))
        if found := self._seen.get_duplicates(sketch):
            return str(min(found))
        self._seen.add(name, sketch)
        return None


def similarity(one: str, other: str) -> float:
    """The similarity that `NearDuplicates` estimates, counted: 0 to 1."""
    left, right = _grams(one), _grams(other)
    return len(left & right) / len(left | right)


def dialogue_of(question: Question) -> str:
    """What is compared of a question."""
    return "\n".join(message.content for message in question.messages)


def text_of(chain: ChainRow) -> str:
    """What is compared of a chain: its steps."""
    return "\n".join(step.text for step in chain.steps)


def _grams(text: str) -> set[str]:
    text = " ".join(text.casefold().split())
    return {text[i : i + _GRAM] for i in range(max(1, len(text) - _GRAM + 1))}
