"""Constrained decoding under random choices."""

import random

import torch
from support.grammar import GrammarProcessor

from mote.inference.grammar import FreeText, StepGrammar
from mote.tokens.routing import Markers

MARKERS = Markers(starts=(10, 12, 14), ends=(11, 13, 15))
CHAINS = [(2,), (0, 2), (0, 1, 2)]
EOS = 9


def test_the_grammar_masks_each_row_after_the_prompt() -> None:
    grammar = GrammarProcessor(CHAINS, MARKERS, [1], EOS, prompt_length=2, max_step_tokens=3)
    scores = grammar(torch.tensor([[3, 3, 10, 5], [3, 3, 14, 5]]), torch.zeros(2, 16))
    assert [row.isfinite().nonzero().flatten().tolist() for row in scores] == [
        [0, *range(2, 9), 11], [0, *range(2, 9), 15]
    ]  # fmt: skip


def test_random_chains_end_with_a_response_within_budget() -> None:
    draws = random.Random(0)
    for trial in range(300):
        most = draws.choice([None, 12, 20, 60])
        grammar = StepGrammar(CHAINS, MARKERS, [1], EOS, max_step_tokens=draws.randint(1, 9), max_tokens=most)
        generated: list[int] = []
        while not generated or not grammar.ended(generated):
            masked = grammar.mask(torch.randn(16), generated)
            generated.append(int(draws.choice(masked.isfinite().nonzero().flatten().tolist())))
        steps = [token for token in generated if token in MARKERS.starts]
        assert tuple(MARKERS.starts.index(step) for step in steps) in CHAINS, (trial, generated)
        assert [token for token in generated if token in MARKERS.ends] == [step + 1 for step in steps]
        assert not {1, EOS} & set(generated)
        assert most is None or len(generated) <= most


def test_free_text_stops_at_the_turn_end_without_markers() -> None:
    text = FreeText([EOS], [10, 11])
    masked = text.mask(torch.zeros(16), [])
    assert masked.isinf().nonzero().flatten().tolist() == [10, 11]
    assert text.ended([3, EOS]) and not text.ended([EOS, 3])
    assert FreeText([EOS]).mask(torch.zeros(16), []).isfinite().all()
