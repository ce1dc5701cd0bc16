"""What may be written next, in every order that random choices take."""

import random

import torch

from mote.inference.grammar import FreeText, StepGrammar
from mote.tokens.routing import Markers

MARKERS = Markers(starts=(10, 12, 14), ends=(11, 13, 15))
CHAINS = [(2,), (0, 2), (0, 1, 2)]
EOS = 9


def test_scores_of_two_rows() -> None:
    grammar = StepGrammar(CHAINS, MARKERS, [1], EOS, prompt_length=2, max_step_tokens=3)
    scores = grammar(torch.tensor([[3, 3, 10, 5], [3, 3, 14, 5]]), torch.zeros(2, 16))
    assert [row.isfinite().nonzero().flatten().tolist() for row in scores] == [
        [0, *range(2, 9), 11], [0, *range(2, 9), 15]
    ]  # fmt: skip


def test_every_way_through_ends_with_an_answer_within_the_budgets() -> None:
    draws = random.Random(0)
    for trial in range(300):
        most = draws.choice([None, 12, 20, 60])
        grammar = StepGrammar(CHAINS, MARKERS, [1], EOS, 0, max_step_tokens=draws.randint(1, 9), max_tokens=most)
        written: list[int] = []
        while not written or not grammar.ended(written):
            masked = grammar.mask(torch.randn(16), written)
            written.append(int(draws.choice(masked.isfinite().nonzero().flatten().tolist())))
        steps = [token for token in written if token in MARKERS.starts]
        assert tuple(MARKERS.starts.index(step) for step in steps) in CHAINS, (trial, written)
        assert [token for token in written if token in MARKERS.ends] == [step + 1 for step in steps]
        assert not {1, EOS} & set(written)
        assert most is None or len(written) <= most


def test_free_text_ends_with_the_turn_and_holds_no_marker() -> None:
    text = FreeText(EOS, [10, 11])
    masked = text.mask(torch.zeros(16), [])
    assert masked.isinf().nonzero().flatten().tolist() == [10, 11]
    assert text.ended([3, EOS]) and not text.ended([EOS, 3])
    assert FreeText(EOS).mask(torch.zeros(16), []).isfinite().all()
