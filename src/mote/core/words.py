"""Text -> words, for quality rules, counts and comparisons."""

import re

STEM = 4  # leading letters in which two forms of a word agree
# A word may have an apostrophe inside. In scripts without spaces each character is a word.
_UNSPACED = "\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+(?:'[^\W{_UNSPACED}]+)*")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)


def words_of(text: str) -> list[str]:
    """Case-folded words in order, without punctuation."""
    return _WORD.findall(text.casefold().replace("\u2019", "'"))


def without_code(text: str) -> str:
    """The text with each Markdown code block or code span replaced by a space."""
    return _CODE.sub(" ", text)


def ngrams_of(words: list[str], length: int) -> set[tuple[str, ...]]:
    """All n-grams of `length` consecutive words."""
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}
