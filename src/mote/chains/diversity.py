"""Self-BLEU of a set of texts (Zhu et al. 2018, Texygen): how much each repeats the others; table 2 of the paper.

By its definition the cost is quadratic in the number of texts. Here each n-gram keeps its two highest counts over the
texts, which suffices to clip by "the highest count in any other text": the same number in linear time.
"""

import bisect
from collections import Counter
from collections.abc import Sequence
from typing import Any

ORDER = 4  # BLEU-4
TOKENIZERS = ("13a", "intl", "char", "none")  # of sacrebleu, those without a download

_Gram = tuple[str, ...]


def self_bleu(texts: Sequence[str], tokenizer: str = "13a") -> float | None:
    """Mean over the texts of sacrebleu's sentence BLEU with all others as references, 0 to 100; lower is more diverse.

    Args:
        texts: The texts; with fewer than two the result is None.
        tokenizer: One of `TOKENIZERS`.
    """
    if len(texts) < 2:
        return None
    bleu = _bleu(tokenizer)
    tokens = [bleu.tokenizer(text).split() for text in texts]
    counts = [Counter(_grams(row)) for row in tokens]
    highest = _two_highest(counts)
    lengths = sorted(map(len, tokens))
    scores = []
    for index, (row, own) in enumerate(zip(tokens, counts, strict=True)):
        correct = [0] * ORDER
        total = [0] * ORDER
        for gram, count in own.items():
            first, holder, second = highest[gram]
            correct[len(gram) - 1] += min(count, second if holder == index else first)
            total[len(gram) - 1] += count
        others = lengths.copy()
        others.pop(bisect.bisect_left(others, len(row)))
        nearest = min(others, key=lambda length: (abs(length - len(row)), length))
        scores.append(
            bleu.compute_bleu(
                correct, total, len(row), nearest, smooth_method="exp", effective_order=True, max_ngram_order=ORDER
            ).score
        )
    return float(sum(scores) / len(scores))


def signature(tokenizer: str = "13a") -> str:
    """The settings of the computation in sacrebleu's notation."""
    import sacrebleu

    return f"nrefs:all-others|case:mixed|eff:yes|tok:{tokenizer}|smooth:exp|version:{sacrebleu.__version__}"


def _bleu(tokenizer: str) -> Any:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize=tokenizer, effective_order=True, max_ngram_order=ORDER)


def _grams(tokens: Sequence[str]) -> list[_Gram]:
    return [tuple(tokens[i : i + order]) for order in range(1, ORDER + 1) for i in range(len(tokens) - order + 1)]


def _two_highest(counts: Sequence[Counter[_Gram]]) -> dict[_Gram, tuple[int, int, int]]:
    """N-gram -> its highest count in a text, that text, and its highest count in any other text."""
    found: dict[_Gram, tuple[int, int, int]] = {}
    for index, own in enumerate(counts):
        for gram, count in own.items():
            first, holder, second = found.get(gram, (0, -1, 0))
            if count > first:
                found[gram] = (count, index, first)
            elif count > second:
                found[gram] = (first, holder, count)
    return found
