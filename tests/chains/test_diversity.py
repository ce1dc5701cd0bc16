"""Self-BLEU in linear time equals sacrebleu's, text by text."""

import pytest
from sacrebleu.metrics.bleu import BLEU

from mote.chains.diversity import TOKENIZERS, self_bleu, signature
from mote.questions.load import load_questions

TEXTS = [
    *("The person wants to keep a house.", "The person wants to keep a cat.", "the the the the the", "the the the"),
    *(
        "Nothing alike here at all!",
        "no",
        "",
        "A cat, a cat, a cat and the person.",
        "The person wants to keep a house.",
    ),
]


def reference(texts: list[str], tokenizer: str) -> float:
    bleu = BLEU(tokenize=tokenizer, effective_order=True)
    scores = [bleu.sentence_score(text, texts[:i] + texts[i + 1 :]).score for i, text in enumerate(texts)]
    return sum(scores) / len(scores)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_self_bleu_equals_sacrebleus(tokenizer: str) -> None:
    assert self_bleu(TEXTS, tokenizer) == pytest.approx(reference(TEXTS, tokenizer), abs=1e-9)
    questions = [row.text for row in load_questions("mote:test", 25)]
    assert self_bleu(questions, tokenizer) == pytest.approx(reference(questions, tokenizer), abs=1e-9)


def test_self_bleu_at_the_ends_of_its_scale() -> None:
    same = self_bleu(["The person wants to keep a house."] * 3)
    assert same == pytest.approx(100)
    assert self_bleu(["one two three four five", "six seven eight nine ten"]) == 0
    assert self_bleu(["alone"]) is None and self_bleu([]) is None


def test_the_signature_names_tokenizer_and_smoothing() -> None:
    assert "tok:intl" in signature("intl") and "version:" in signature("intl")
