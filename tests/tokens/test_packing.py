"""Batch contents, packing of chains into rows, and that packing changes no result."""

import itertools
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adapters import adapted
from support.chain_tokens import some_chains

from mote.tokens.encode import IGNORED, Tokens
from mote.tokens.masks import PADDING, Layout, sdpa_mask, skip_probabilities
from mote.tokens.packing import ChainDataset, collate, pack

STEPS = ("analysis", "guidance", "response")


def tokens(ids: list[int], steps: list[int]) -> Tokens:
    return Tokens(ids=ids, labels=[IGNORED, *ids[1:]], steps=steps)


def dataset(chains: list[Tokens], skip_p: float = 0.0, seed: int = 0, row_length: int | None = None) -> ChainDataset:
    return ChainDataset(chains, skip_probabilities(skip_p, {}, STEPS), seed, row_length)


def test_a_batch_is_padded() -> None:
    rows = [tokens([5, 6, 7, 8], [0, 0, 1, 3]), tokens([5, 6], [0, 3])]
    data = dataset(rows)
    batch = collate([data[0], data[1]], pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 6, 9, 9]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, 8], [IGNORED, 6, IGNORED, IGNORED]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert batch["step_ids"].tolist() == [[0, 0, 1, 3], [0, 3, 0, 0]]
    assert batch["document_ids"].tolist() == [[0] * 4, [0, 0, PADDING, PADDING]]
    first = data[0][0].question_expert
    second = data[1][0].question_expert
    assert batch["question_experts"].tolist() == [[first] * 4, [second, second, 0, 0]]
    assert batch["visibility"].tolist() == [[[True] * 4] * 4, [[True] * 4] * 2 + [[False] * 4] * 2]


def test_positions_and_steps_restart_in_each_packed_chain() -> None:
    data = dataset([tokens([5, 6, 7, 8], [0, 0, 1, 3]), tokens([5, 6, 7], [0, 1, 3])], skip_p=1.0, row_length=16)
    assert len(data) == 1 and [len(chain.tokens.ids) for chain in data[0]] == [4, 3]
    batch = collate([data[0]], pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 5, 6, 7]]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 2, 0, 1, 1]]
    mask = sdpa_mask(Layout(batch["step_ids"], batch["visibility"], batch["document_ids"]))[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1, 0, 1],
    ]


def draws(data: ChainDataset) -> dict[int, Any]:
    """The draws of each chain, by its index."""
    places = {id(chain): place for place, chain in enumerate(data.chains)}
    drawn = [chain for row in range(len(data)) for chain in data[row]]
    return {places[id(chain.tokens)]: (chain.visibility.tolist(), chain.question_expert) for chain in drawn}


def test_draws_change_with_the_epoch_and_are_the_same_again() -> None:
    chains = [tokens([1, 2, 3, 4], [0, 1, 2, 3]) for _ in range(64)]
    data = dataset(chains, 0.5, seed=1)
    first = draws(data)
    assert draws(data) == first
    assert {expert for _, expert in first.values()} == {1, 2, 3}
    data.set_epoch(1)
    second = draws(data)
    assert second != first
    later = dataset(chains, 0.5, seed=1)  # as after a cut
    later.set_epoch(1)
    assert draws(later) == second
    assert draws(dataset(chains, 0.5, seed=2)) != first
    packed = dataset(chains, 0.5, seed=1, row_length=40)
    assert len(packed) < len(chains) and draws(packed) == first


@pytest.mark.parametrize("skip_p", [0.2, 0.5])
def test_draws_of_a_chain_spread_evenly_over_epochs(skip_p: float) -> None:
    """Each expert reads a question once in three epochs, and no pair is hidden much more often than its probability."""
    data = dataset([tokens([1, 2, 3, 4], [0, 1, 2, 3]) for _ in range(200)], skip_p)
    experts, hidden = [], []
    for epoch in range(12):
        data.set_epoch(epoch)
        drawn = [data[row][0] for row in range(len(data))]
        experts.append([chain.question_expert for chain in drawn])
        hidden.append(torch.stack([~chain.visibility[[2, 3, 3], [1, 1, 2]] for chain in drawn]))
    for begin in range(0, 12, 3):
        assert all(sorted(turn) == [1, 2, 3] for turn in zip(*experts[begin : begin + 3], strict=True))
    assert {tuple(turn) for turn in zip(*experts[:3], strict=True)} == set(itertools.permutations([1, 2, 3]))
    for epochs in (3, 5, 12):
        counts = torch.stack(hidden[:epochs]).sum(0)  # independent draws would reach 3 of 3, and 0 of 12 at one half
        assert (counts - epochs * skip_p).abs().max() < 1.5
        assert abs(counts.float().mean() / epochs - skip_p) < 0.05


def test_rows_are_repacked_each_epoch_and_keep_their_number() -> None:
    data = dataset(some_chains(40), row_length=64)
    first = [list(row) for row in data.rows]
    data.set_epoch(1)
    assert data.rows != first and len(data.rows) == len(first)
    data.set_epoch(0)
    assert data.rows == first


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 120), st.integers(0, 10**6))
def test_every_sequence_is_whole_in_one_row(lengths: list[int], room: int, seed: int) -> None:
    rows = pack(lengths, room, random.Random(seed))
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[index] for index in row) <= room for row in rows)
    assert rows == pack(lengths, room, random.Random(seed))
    assert len(rows) == len(pack(lengths, room, random.Random(seed + 1)))
    assert len(rows) <= 2 * sum(lengths) / room + 1  # two rows that are half empty would have been one


@pytest.mark.parametrize(("count", "room"), [(30, 1024), (300, 2048), (6000, 2048)])
def test_less_than_5_percent_is_padding(count: int, room: int) -> None:
    """Lengths as chains have them: around 200 tokens, a long tail; few chains as well as many."""
    rng = random.Random(count)
    lengths = [min(room, max(60, round(rng.lognormvariate(5.3, 0.5)))) for _ in range(count)]
    rows = pack(lengths, room, rng)
    totals = [sum(lengths[index] for index in row) for row in rows]
    assert 1 - sum(totals) / (max(totals) * len(totals)) < 0.05
    alone = [max(lengths[i : i + 4]) * len(lengths[i : i + 4]) for i in range(0, count, 4)]
    assert 1 - sum(lengths) / sum(alone) > 0.2  # without packing, in batches of four


def test_packed_rows_have_the_loss_and_gradients_of_single_rows() -> None:
    chains = some_chains(12)
    found = []
    for row_length in (None, 64):
        data = dataset(chains, 0.5, row_length=row_length)
        model = adapted().train()
        batch = collate([data[row] for row in range(len(data))], pad_id=0)
        mask = sdpa_mask(Layout(batch.pop("segment_ids"), batch.pop("visibility"), batch["document_ids"]))
        del batch["weights"]
        loss = model(**batch, attention_mask=mask).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        found.append((loss.item(), len(data), gradients))
    (single, many, wanted), (packed, few, gradients) = found
    assert few < many / 2 and packed == pytest.approx(single, abs=1e-5)
    assert any(gradient.abs().max() > 1e-3 for gradient in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4)


def test_visibility_across_documents_would_change_the_loss() -> None:
    """Negative control: the same rows treated as one document have a different loss."""
    data = dataset(some_chains(6), row_length=64)
    model = adapted()
    batch = collate([data[row] for row in range(len(data))], pad_id=0)
    visibility = batch.pop("visibility")
    documents = batch["document_ids"]
    del batch["segment_ids"], batch["weights"]
    layout = Layout(batch["step_ids"], visibility, documents)
    separate = model(**batch, attention_mask=sdpa_mask(layout)).loss
    one_document = layout._replace(documents_B_T=documents.clamp_max(0))
    together = model(**batch, attention_mask=sdpa_mask(one_document)).loss
    assert abs((separate - together).item()) > 1e-3
