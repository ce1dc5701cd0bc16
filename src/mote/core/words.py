"""Text -> words, as rules, counts and comparisons of texts take them."""

import re

# A word may have an apostrophe inside. Scripts that put no spaces between words give one word a character.
_UNSPACED = "\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+(?:'[^\W{_UNSPACED}]+)*")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)


def words_of(text: str) -> list[str]:
    """Case-folded words in order, without punctuation."""
    return _WORD.findall(text.casefold().replace("\u2019", "'"))


def without_code(text: str) -> str:
    """The text with a space for each block or span of code in backticks (Markdown)."""
    return _CODE.sub(" ", text)


def runs_of(words: list[str], length: int) -> set[tuple[str, ...]]:
    """Every run of `length` words that stand one after the other."""
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}
