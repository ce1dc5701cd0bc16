"""Rules that a written step must keep; a chain that breaks one is rejected with the rule's name."""

import re
from collections.abc import Iterable

from mote.engines import Completion

EMPTY, TRUNCATED, LOOPING, ECHO, MARKER = "empty", "truncated", "looping", "echo", "marker"

_WORD = re.compile(r"\w+")
_LONGEST_LOOP = 8  # words
_SHARED_WORDS = 8  # a run this long that also stands in an instruction or an example is copied, not written


def fault(completion: Completion, written_before: Iterable[str]) -> str | None:
    """The first rule that a step breaks, None where it keeps them all.

    Args:
        completion: What the model wrote.
        written_before: Texts of the prompt that it must not repeat: instructions, examples, earlier steps.

    Returns:
        `empty` (no words), `truncated` (hit the token limit), `marker` (a special token's form), `looping` (a phrase
        three times in a row, or a sentence three times) or `echo` (eight words in a row from the prompt).
    """
    words = _WORD.findall(completion.text.lower())
    if not words:
        return EMPTY
    if completion.finish == "length":
        return TRUNCATED
    if "<|" in completion.text:
        return MARKER
    if _loops(words) or _repeats_sentence(completion.text):
        return LOOPING
    if _runs(words) & {run for text in written_before for run in _runs(_WORD.findall(text.lower()))}:
        return ECHO
    return None


def _loops(words: list[str]) -> bool:
    for size in range(1, _LONGEST_LOOP + 1):
        for start in range(len(words) - 3 * size + 1):
            phrase = words[start : start + size]
            if phrase == words[start + size : start + 2 * size] == words[start + 2 * size : start + 3 * size]:
                return True
    return False


def _repeats_sentence(text: str) -> bool:
    sentences = [" ".join(_WORD.findall(part)) for part in re.split(r"[.!?\n]+", text.lower())]
    long = [sentence for sentence in sentences if len(sentence.split()) > 2]
    return any(long.count(sentence) >= 3 for sentence in long)


def _runs(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + _SHARED_WORDS]) for i in range(len(words) - _SHARED_WORDS + 1)}
