"""Costs of chains, computed by hand."""

import json

import pytest
from support.chains import made

from mote.chains.costs import Cost, CostCounter, Price, cost_lines
from mote.core.records import ChainRow, ChainTokens


def spent(*tokens: ChainTokens, accepted: int = 2, price: Price | None = None) -> Cost:
    """What chains of two seconds each cost together."""
    found = CostCounter()
    for number, one in enumerate(tokens):
        found.add(made(str(number), "How?", response="So.").model_copy(update={"tokens": one}))
    return found.cost(accepted, price)


ROWS = [ChainTokens(made=30, kept=20, read=100), ChainTokens(made=50, kept=20, read=300)]
SAID_BY_NOBODY = ChainTokens(made=9, kept=9)
PRICE = Price(read=0.5, written=2.0)


def test_costs_are_divided_by_the_accepted_chains() -> None:
    cost = spent(*ROWS, *ROWS, price=PRICE)
    assert (cost.tokens, cost.kept, cost.read, cost.unsaid, cost.seconds) == (160, 80, 800, 0, 8.0)
    assert (cost.tokens_each, cost.read_each, cost.seconds_each) == (80.0, 400.0, 4.0)
    assert cost.dollars == pytest.approx((800 * 0.5 + 160 * 2.0) / 1e6) and cost.dollars_each == cost.dollars / 2
    assert spent(*ROWS).dollars is None
    assert spent(*ROWS, accepted=0, price=PRICE).dollars_each is None


def test_unknown_prompt_tokens_leave_out_the_dollars() -> None:
    cost = spent(*ROWS, SAID_BY_NOBODY, price=PRICE)
    assert (cost.tokens, cost.read, cost.unsaid) == (89, 400, 1)
    assert cost.read_each is None and cost.dollars is None and cost.tokens_each == 44.5
    lines = cost_lines(cost)
    assert "prompt tokens: 400; - per accepted chain; 1 chains do not record prompt tokens" in lines
    assert (
        lines[-1].startswith("money: - USD at 0.5 USD per million prompt tokens")
        and "1 chains do not record" in lines[-1]
    )


def test_imported_chains_have_no_cost() -> None:
    assert "not recorded" in cost_lines(spent(ChainTokens(made=0, kept=0), price=PRICE))[0]


def test_rows_without_prompt_tokens_can_be_read() -> None:
    row = json.loads(made("a", "How?", response="So.").model_dump_json())
    del row["tokens"]["read"]
    assert ChainRow.model_validate(row).tokens.read is None
