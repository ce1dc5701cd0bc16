"""Several draws of a chain in one row: what is repeated, the visibility, and that the loss is the mean of the draws."""

import random
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adapters import adapted
from support.chain_tokens import chain_of, some_chains
from torch import Tensor

from mote.models.attention import GROUPED_SDPA
from mote.tokens.encode import IGNORED, Tokens
from mote.tokens.masks import Layout, block_mask, document_mask, draw_visibility, sdpa_mask, skip_probabilities
from mote.tokens.packing import ChainDataset, DrawnChain, collate, repeated_steps, unroll
from mote.train.trainer import token_weights

STEPS = ("analysis", "guidance", "response")
HALF = skip_probabilities(0.5, {}, STEPS)


def weighted_loss(model: Any, rows: list[list[DrawnChain]], mask: Any = sdpa_mask) -> Tensor:
    """The loss of `MoteTrainer` for weighted tokens."""
    batch = collate(rows, pad_id=0)
    weights = token_weights(batch, torch.ones(4))
    labels = batch.pop("labels")[:, 1:]
    seen = mask(Layout(batch.pop("segment_ids"), batch.pop("visibility"), batch["document_ids"]))
    del batch["weights"]
    logits = model(**batch, attention_mask=seen).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
    return (losses * weights).sum() / weights.sum()


def alone(chains: list[Tokens], draws: int, seed: int) -> list[list[DrawnChain]]:
    """Each draw of each chain as a separate row, drawn as the dataset draws it."""
    rows = []
    for index, chain in enumerate(chains):
        for draw in range(draws):
            rng = random.Random(f"{seed}/{index}")
            visibility = draw_visibility(sorted(set(chain.steps) - {0}), HALF, rng, draw / draws)
            expert = random.Random(f"{seed}/{index}/question").sample([1, 2, 3], 3)[0]
            rows.append([DrawnChain(unroll(chain, HALF, 1), visibility, expert)])
    return rows


def test_a_row_of_two_draws() -> None:
    chain = Tokens([5, 6, 64, 9, 65, 66, 67, 68, 69, 1], [IGNORED] * 2 + [64, 9, 65, 66, 67, 68, 69, 1],
                   [0, 0, 1, 1, 1, 2, 2, 3, 3, 3])  # fmt: skip
    row = unroll(chain, HALF, 2)
    assert row.ids == [5, 6, 64, 9, 65, 66, 67, 68, 69, 1, 66, 67, 68, 69, 1]
    assert row.labels == [IGNORED, IGNORED, 64, 9, 65, 66, 67, 68, 69, 1, IGNORED, 67, 68, 69, 1]
    assert row.steps == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 2, 2, 3, 3, 3]
    assert row.segments == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 5, 5, 6, 6, 6]
    assert row.weights == [1, 1, 1, 1, 1, 1, *[0.5] * 9]
    drawn = ChainDataset([chain], HALF, 0, draws=2)[0]
    [first, second] = [drawn[0].visibility[[2, 3, 3], [1, 1, 2]], drawn[0].visibility[[5, 6, 6], [1, 1, 5]]]
    assert torch.equal(first, ~second)  # at one half the second draw hides what the first shows
    mask = sdpa_mask(Layout.of(collate([drawn], 0)))[0, 0]
    assert not mask[10:, 5:10].any() and mask[:, :2].tril().sum() == mask[:, :2].sum() == 29


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 5), st.integers(0, 10**6), st.sampled_from([0.2, 0.5, 0.9]))
def test_every_draw_equals_the_chain_with_its_visibility(draws: int, seed: int, skip_p: float) -> None:
    [chain] = some_chains(1, seed)
    probabilities = skip_probabilities(skip_p, {}, STEPS)
    data = ChainDataset([chain], probabilities, seed, draws=draws)
    [drawn] = data[0]
    row = drawn.tokens
    again = repeated_steps(sorted(set(chain.steps) - {0}), probabilities)
    labels = [label for label in row.labels if label != IGNORED]
    total = sum(weight for weight, label in zip(row.weights, row.labels, strict=True) if label != IGNORED)
    assert total == pytest.approx(sum(label != IGNORED for label in chain.labels)) and len(labels) >= total - 1e-9
    for draw in range(draws):
        own = {step: step + 3 * draw if draw and step in again else step for step in range(4)}
        at = [t for t, segment in enumerate(row.segments) if segment in own.values()]
        assert [row.ids[t] for t in at] == chain.ids and [row.steps[t] for t in at] == chain.steps
        shown = draw_visibility(sorted(set(chain.steps) - {0}), probabilities, random.Random(f"{seed}/0"), draw / draws)
        for later, earlier in combinations(sorted(set(chain.steps)), 2):
            assert drawn.visibility[own[later], own[earlier]] == shown[later, earlier]
    if again:
        for first, second in combinations(range(draws), 2):
            for later, earlier in ((later, earlier) for later in again for earlier in again):
                assert not drawn.visibility[later + 3 * second, earlier + 3 * first]
    else:
        assert row.ids == chain.ids and drawn.visibility.all()


@pytest.mark.parametrize("draws", [2, 3])
@pytest.mark.parametrize("row_length", [None, 128])
def test_the_loss_and_the_gradients_are_the_mean_of_the_draws(draws: int, row_length: int | None) -> None:
    chains = some_chains(6, seed=3)
    data = ChainDataset(chains, HALF, 3, row_length, draws)
    assert any(len(chain.ids) > len(one.ids) for chain, one in zip(data.chains, chains, strict=True))
    together, separate = adapted().train(), adapted().train()
    found = weighted_loss(together, [data[row] for row in range(len(data))])
    wanted = weighted_loss(separate, alone(chains, draws, 3))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    found.backward()
    wanted.backward()
    for (name, one), other in zip(together.named_parameters(), separate.parameters(), strict=True):
        if one.requires_grad:
            assert one.grad is not None and other.grad is not None, name
            torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)


def test_draws_that_see_each_other_have_another_loss() -> None:
    """Negative control."""
    model = adapted()
    data = ChainDataset([chain_of(1, 2, 3)], HALF, 0, draws=2)
    [drawn] = data[0]
    leaking = DrawnChain(
        drawn.tokens, drawn.visibility | torch.ones(7, 7, dtype=torch.bool).triu(), drawn.question_expert
    )
    leaking.visibility[5:, :5] = True
    assert abs(weighted_loss(model, [[leaking]]) - weighted_loss(model, [[drawn]])) > 1e-3


def test_all_masks_show_the_same_draws() -> None:
    """FlexAttention's mask as edges: PyTorch computes its gradients on a GPU only (tests/end_to_end/test_gpu.py)."""
    model = adapted().train()
    data = ChainDataset(some_chains(5, seed=1), HALF, 1, 160, draws=2)
    rows = [data[row] for row in range(len(data))]
    found = []
    torch.testing.assert_close(*(dense(form, rows) for form in (block_mask, sdpa_mask)))
    for name, mask in {"sdpa": sdpa_mask, GROUPED_SDPA: document_mask}.items():
        model.base_model.model.set_attn_implementation(name)
        found.append(weighted_loss(model, rows, mask))
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)


def dense(form: Any, rows: list[list[DrawnChain]]) -> Tensor:
    """Any form of mask as a dense matrix over pairs of tokens."""
    batch = collate(rows, pad_id=0)
    made = form(Layout.of(batch))
    if isinstance(made, Tensor):
        return made[:, 0]
    length = torch.arange(batch["input_ids"].shape[1])
    row = torch.arange(len(rows))[:, None, None]
    seen: Tensor = made.mask_mod(row, 0, length[:, None], length)
    return seen


def test_each_pair_is_hidden_in_the_same_share_of_draws() -> None:
    probabilities = skip_probabilities(0.3, {"response": {"analysis": 0.9}}, STEPS)
    shares = []
    for seed in range(2000):
        shown = [
            draw_visibility([1, 2, 3], probabilities, random.Random(seed), draw / 4)[[2, 3, 3], [1, 1, 2]]
            for draw in range(4)
        ]
        hidden = 4 - torch.stack(shown).sum(0)
        assert all(count in allowed for count, allowed in zip(hidden.tolist(), [(1, 2), (3, 4), (1, 2)], strict=True))
        shares.append(hidden / 4)
    torch.testing.assert_close(torch.stack(shares).mean(0), torch.tensor([0.3, 0.9, 0.3]), atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("chain", "probabilities", "draws"),
    [
        (chain_of(3), HALF, 2),
        (chain_of(1, 2, 3), HALF, 1),
        (chain_of(1, 2, 3), skip_probabilities(0.0, {}, STEPS), 4),
        (chain_of(1, 2, 3), skip_probabilities(1.0, {}, STEPS), 4),
        (chain_of(1, 3), skip_probabilities(0.5, {"response": {"analysis": 0.0}}, STEPS), 4),
    ],
    ids=["a response alone", "one draw", "nothing is skipped", "everything is skipped", "a pair that is always seen"],
)
def test_what_all_draws_share_is_stored_once(chain: Tokens, probabilities: Tensor, draws: int) -> None:
    row = unroll(chain, probabilities, draws)
    assert (row.ids, row.labels, row.steps, row.segments) == (chain.ids, chain.labels, chain.steps, chain.steps)
    assert row.weights == [1.0] * len(chain.ids)


def test_only_what_can_differ_is_repeated() -> None:
    late = skip_probabilities(0.0, {"response": {"guidance": 0.5}}, STEPS)
    row = unroll(chain_of(1, 2, 3), late, 2)
    assert row.ids.count(64) == row.ids.count(66) == 1 and row.ids.count(68) == 2
