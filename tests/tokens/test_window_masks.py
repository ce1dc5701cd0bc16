"""Masks of models with sliding windows or chunks: equal to separately built sequences longer than these."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from support.windows import BASES, LENGTHS, REACH, chain, drawn, plain_logits, tiny_base
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from mote.models.attention import GROUPED_SDPA
from mote.models.layers import layers_of
from mote.tokens.masks import Layout, eager_mask, mask_form, masks_for, sdpa_mask
from mote.tokens.packing import ChainDataset, DrawnChain, collate

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
ATTENTIONS = ("eager", "sdpa", GROUPED_SDPA, "flex_attention")
REFUSED = {("doge", "flex_attention"), ("gemma2", "sdpa"), ("gemma2", GROUPED_SDPA)}  # they drop a mask, a soft cap
PAIRS = ((2, 1), (3, 1), (3, 2))  # (later step, earlier step)


@pytest.fixture(scope="module", autouse=True)
def uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def without(*hidden: tuple[int, int]) -> Tensor:
    visibility = torch.ones(4, 4, dtype=torch.bool)
    for later, earlier in hidden:
        visibility[later, earlier] = False
    return visibility


@torch.no_grad()
def masked_logits(model: Any, rows: Sequence[Sequence[DrawnChain]], attention: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits (B, T, V) under our masks, and the batch."""
    model.set_attn_implementation(attention)
    batch = collate(rows, pad_id=0)
    make_masks = masks_for(model.config, mask_form(attention))
    masks = make_masks(Layout.of(batch))
    logits = model(
        input_ids=batch["input_ids"], attention_mask=masks, position_ids=batch["position_ids"], use_cache=False
    ).logits
    return logits, batch


@pytest.mark.parametrize(("name", "attention"), [c for c in itertools.product(BASES, ATTENTIONS) if c not in REFUSED])
def test_packed_and_skipping_rows_equal_built_sequences(name: str, attention: str) -> None:
    """All draws of (x, a, g, y), two in a row and padded; each step against the chain of what it sees."""
    model = tiny_base(name)
    draws = [hidden for n in range(4) for hidden in itertools.combinations(PAIRS, n)]
    rows = [[drawn(without(*h), 1, 2, 3, seed=i), drawn(without(), 3, seed=9)] for i, h in enumerate(draws)]
    rows.append([drawn(without(), 1, 3, seed=9)])
    logits, batch = masked_logits(model, rows, attention)
    compared = 0
    for row, hidden in enumerate(draws):
        for step in range(4):
            seen = [s for s in range(1, step + 1) if (step, s) not in hidden]
            if any((s in seen) != ((later, s) not in hidden) for later in seen[:-1] for s in range(1, later)):
                continue  # second-hand: it sees a step that saw more or less than it does
            built = plain_logits(model, chain(*seen, seed=row).ids)
            own = (batch["document_ids"][row] == 0) & (batch["segment_ids"][row] == step)
            torch.testing.assert_close(logits[row][own], built[-LENGTHS[step] :], atol=1e-5, rtol=0)
            compared += 1
    assert compared == 30
    alone = plain_logits(model, chain(3, seed=9).ids)
    for row in range(len(draws)):
        torch.testing.assert_close(logits[row][batch["document_ids"][row] == 1], alone, atol=1e-5, rtol=0)
    alone = plain_logits(model, chain(1, 3, seed=9).ids)
    torch.testing.assert_close(logits[-1, : len(alone)], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", BASES)
def test_a_single_mask_would_lose_the_window(name: str) -> None:
    """The negative control: what these tests compare is not blind to windows and chunks."""
    model = tiny_base(name)
    model.set_attn_implementation("eager")
    batch = collate([[drawn(without(), 1, 2, 3)]], pad_id=0)
    mask = eager_mask(Layout.of(batch))
    with torch.no_grad():
        lost = model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False).logits[0]
    assert (lost - plain_logits(model, chain(1, 2, 3).ids)).abs().max() > 1e-3
    assert any(layer.reach == REACH for layer in layers_of(model.config))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", ["gemma3", "llama4", "mistral"])
def test_draws_of_a_row_equal_draws_in_separate_rows(name: str, attention: str) -> None:
    model = tiny_base(name)
    probabilities = torch.full((4, 4), 0.5).tril(-1)
    probabilities[:, 0] = 0
    tokens = chain(1, 2, 3)
    [row] = [ChainDataset([tokens], probabilities, seed=3, draws=3)[0]]
    logits, batch = masked_logits(model, [row], attention)
    segments = batch["segment_ids"][0]
    visibility = row[0].visibility
    for draw in range(3):
        own = [0, 1, *(step + 3 * draw for step in (2, 3))]  # what all draws share comes first
        alone, single = masked_logits(model, [[drawn(visibility[own][:, own], 1, 2, 3)]], attention)
        for step in (2, 3):
            found = logits[0][segments == own[step]]
            torch.testing.assert_close(found, alone[0][single["segment_ids"][0] == step], atol=1e-5, rtol=0)


def test_windows_longer_than_the_row_need_no_second_mask() -> None:
    model = tiny_base("gemma3")
    batch = collate([[drawn(without(), 1, 2, 3)]], pad_id=0)
    given = Layout.of(batch)
    made = masks_for(model.config, sdpa_mask)(given)
    assert set(made) == {"full_attention", "sliding_attention"}
    assert made["full_attention"].sum() > made["sliding_attention"].sum()
    wide = type(model.config)(**{**model.config.to_dict(), "sliding_window": 29})
    made = masks_for(wide, sdpa_mask)(given)
    assert made["full_attention"] is made["sliding_attention"]
    flex = masks_for(model.config, mask_form("flex_attention"))(given)
    assert all(isinstance(mask, BlockMask) for mask in flex.values())
