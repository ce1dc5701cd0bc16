"""Which marker may come next, by hand."""

import random

from mote.inference.grammar import START, ChainGrammar
from mote.tokens.routing import Markers

MARKERS = Markers(starts=(10, 12, 14), ends=(11, 13, 15))
CHAINS = [(2,), (0, 2), (0, 1, 2)]
EOS = 9


def test_chains_by_hand() -> None:
    grammar = ChainGrammar(CHAINS, MARKERS, EOS, max_step_tokens=3)
    assert grammar.allowed([]) == ([10, 14], True)
    assert grammar.allowed([10]) == ([], False)  # no step is empty
    assert grammar.allowed([10, 5]) == ([11], False)
    assert grammar.allowed([10, 5, 5, 5]) == ([11], True)  # the budget is used
    assert grammar.allowed([10, 5, 11]) == ([12, 14], True)
    assert grammar.allowed([10, 5, 11, 12, 5, 13]) == ([14], True)
    assert grammar.allowed([14, 5, 15]) == ([9], True)
    assert grammar.ended([14, 5, 15]) and not grammar.ended([10, 5, 11])


def test_budget_in_all() -> None:
    grammar = ChainGrammar(CHAINS, MARKERS, EOS, max_step_tokens=50, max_tokens=12)
    assert grammar.allowed([10, 5, 5, 5, 5]) == ([11], False)
    assert grammar.allowed([10, 5, 5, 5, 5, 5]) == ([11], True)  # half of all is used
    assert grammar.allowed([10, 5, 5, 5, 5, 5, 11]) == ([14], True)  # no further reasoning, though it could follow
    assert grammar.allowed([14, *[5] * 10]) == ([15], True)
    full = ChainGrammar([(0, 1, 2)], MARKERS, EOS, max_step_tokens=50, max_tokens=12)
    assert full.allowed([10, 5, 5, 5, 5, 5, 11]) == ([12], True)
    assert full.allowed([10, 5, 5, 5, 5, 5, 11, 12]) == ([13], True)  # a forced step is opened and closed
    assert full.allowed([10, 5, 5, 5, 5, 5, 11, 12, 13, 14]) == ([], False)


def test_advancing_in_pieces_equals_advancing_at_once() -> None:
    draws = random.Random(0)
    grammar = ChainGrammar(CHAINS, MARKERS, EOS, max_step_tokens=3, max_tokens=12)
    for _ in range(200):
        ids = draws.choices(range(16), k=draws.randint(1, 20))
        cut = draws.randint(0, len(ids))
        pieces = grammar.advance(grammar.advance(START, ids[:cut]), ids[cut:])
        assert pieces == grammar.advance(START, ids) and pieces.total == len(ids)
