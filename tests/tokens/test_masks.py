"""Masks and positions against the words of decision 4, in three forms, and against chains that are really built."""

import itertools
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adapters import adapted
from support.chain_tokens import END_OF_TURN, TEXTS, chain_of
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.functional import scaled_dot_product_attention

from mote.core.errors import UserError
from mote.models.attention import GROUPED_SDPA, grouped_sdpa
from mote.tokens.masks import (
    PADDING,
    Layout,
    block_mask,
    document_mask,
    draw_visibility,
    positions,
    sdpa_mask,
    skip_probabilities,
)
from mote.tokens.packing import DrawnChain, Unrolled, collate

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
STEPS = ("analysis", "guidance", "response")


@dataclass
class Chain:
    """Lengths of the question and of each step (0: not there), and which step sees which."""

    lengths: list[int]
    visibility: Tensor

    @property
    def steps(self) -> list[int]:
        return [step for step, length in enumerate(self.lengths) for _ in range(length)]


@dataclass
class Row:
    """Packed chains with padding on both sides."""

    left: int
    chains: list[Chain]
    right: int = 0

    @property
    def tokens(self) -> list[tuple[int, Chain | None, int]]:
        """Document, chain and step of each token."""
        inside = [(d, chain, step) for d, chain in enumerate(self.chains) for step in chain.steps]
        nothing = (PADDING, None, 0)
        return [nothing] * self.left + inside + [nothing] * self.right

    def may_see(self, query: int, key: int) -> bool:
        """Decision 4, for one token and another."""
        if query == key:
            return True
        (document, chain, step), (other, _, earlier) = self.tokens[query], self.tokens[key]
        return chain is not None and document == other and key < query and bool(chain.visibility[step, earlier])


@st.composite
def batches(draw: st.DrawFn) -> list[Row]:
    """Rows of one length: random schemes, packings and paddings."""
    steps = draw(st.integers(1, 5))
    rng = random.Random(draw(st.integers(0, 10**6)))
    probabilities = skip_probabilities(0.5, {}, tuple(f"step{i}" for i in range(steps)))

    def chain() -> Chain:
        lengths = [rng.randint(1, 3), *(rng.randint(0, 3) for _ in range(steps))]
        return Chain(
            lengths, draw_visibility([s for s, length in enumerate(lengths) if s and length], probabilities, rng)
        )

    rows = [Row(draw(st.integers(0, 2)), [chain() for _ in range(draw(st.integers(1, 3)))]) for _ in range(2)]
    longest = max(len(row.tokens) for row in rows)
    for row in rows:
        row.right = longest - len(row.tokens)
    return rows


def layout_of(rows: list[Row]) -> Layout:
    """What the masks are made of."""
    steps = torch.tensor([[step for _, _, step in row.tokens] for row in rows])
    documents = torch.tensor([[document for document, _, _ in row.tokens] for row in rows])
    width = len(rows[0].chains[0].visibility)
    blind = torch.zeros(width, dtype=torch.bool)
    visibility = torch.stack(
        [
            torch.stack([blind if chain is None else chain.visibility[step] for _, chain, step in row.tokens])
            for row in rows
        ]
    )
    return Layout(steps, visibility, documents)


def slow_positions(chain: Chain) -> list[int]:
    where: list[int] = []
    for t, step in enumerate(chain.steps):
        same = [where[k] for k in range(t) if chain.steps[k] == step]
        seen = [where[k] for k in range(t) if chain.steps[k] < step and chain.visibility[step, chain.steps[k]]]
        where.append(max(same) + 1 if same else (max(seen) + 1 if seen else 0))
    return where


def slow_attention(rows: list[Row], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Reference attention, token by token over the visible keys, (B, H, T, D); two heads share a key."""
    out = torch.empty_like(query)
    for b, row in enumerate(rows):
        for head, t in itertools.product(range(query.shape[1]), range(query.shape[2])):
            seen = [k for k in range(query.shape[2]) if row.may_see(t, k)]
            scores = key[b, head // 2, seen] @ query[b, head, t] / query.shape[-1] ** 0.5
            out[b, head, t] = scores.softmax(0) @ value[b, head // 2, seen]
    return out


@pytest.fixture(scope="module", autouse=True)
def flex_gradients_on_a_cpu() -> Any:
    """PyTorch's own dense form of FlexAttention has gradients; only a check refuses them on a CPU."""
    check = flex._validate_device
    flex._validate_device = lambda *_: None
    with torch.compiler.set_stance("force_eager"):
        yield
    flex._validate_device = check


@settings(deadline=None, max_examples=150)
@given(batches())
def test_edges_and_positions_equal_the_definition(rows: list[Row]) -> None:
    edges = sdpa_mask(layout_of(rows))
    length = range(len(rows[0].tokens))
    assert edges[:, 0].tolist() == [[[row.may_see(q, k) for k in length] for q in length] for row in rows]
    for chain in (chain for row in rows for chain in row.chains):
        assert positions(torch.tensor(chain.steps), chain.visibility).tolist() == slow_positions(chain)


@settings(deadline=None, max_examples=60)
@given(batches(), st.integers(0, 10**6))
def test_three_forms_have_the_same_outputs_and_gradients(rows: list[Row], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    length = len(rows[0].tokens)
    layout = layout_of(rows)
    given_ = [
        torch.randn(len(rows), heads, length, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    ]
    upstream = torch.randn(given_[0].shape, generator=generator, dtype=torch.float64)
    slow = slow_attention(rows, *given_)
    forms = (
        scaled_dot_product_attention(*given_, attn_mask=sdpa_mask(layout), enable_gqa=True),
        flex.flex_attention(*given_, block_mask=block_mask(layout), enable_gqa=True),
    )
    for form in forms:
        torch.testing.assert_close(form, slow, atol=1e-10, rtol=0)
        for found, wanted in zip(
            torch.autograd.grad(form, given_, upstream),
            torch.autograd.grad(slow, given_, upstream, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(found, wanted, atol=1e-10, rtol=0)


@settings(deadline=None, max_examples=40)
@given(batches(), st.integers(0, 10**6))
def test_attention_document_by_document_equals_the_whole_mask(rows: list[Row], seed: int) -> None:
    """Outputs and gradients, padding aside, through the CPU's attention with and without what it knows of documents."""
    generator = torch.Generator().manual_seed(seed)
    length = len(rows[0].tokens)
    layout = layout_of(rows)
    real = (layout.documents_B_T != PADDING)[:, :, None, None]
    found = []
    for mask in (sdpa_mask(layout), document_mask(layout)):
        generator.manual_seed(seed)
        given_ = [
            torch.randn(len(rows), heads, length, 8, generator=generator, dtype=torch.float64, requires_grad=True)
            for heads in (4, 2, 2)
        ]
        out = grouped_sdpa(torch.nn.Module(), *given_, mask)[0].masked_fill(~real, 0)
        assert type(out) is Tensor
        upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        found.append([out, *torch.autograd.grad(out, given_, upstream)])
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-10, rtol=0)


def test_documents_that_see_everything_need_no_mask() -> None:
    rows = [
        Row(2, [Chain([3, 2, 0, 2], visibility_without(())), Chain([2, 1, 0, 1], visibility_without(((3, 1),)))], 1)
    ]
    assert document_mask(layout_of(rows)).documents == [[(2, True), (7, True), (4, False), (1, True)]]


def long_rows() -> list[Row]:
    """Several blocks of 128 tokens, some of which hold no edge."""
    rng = random.Random(0)
    probabilities = skip_probabilities(0.5, {}, STEPS)
    packed = [Chain([70, 60, 50, 40], draw_visibility([1, 2, 3], probabilities, rng)) for _ in range(3)]
    return [Row(0, packed), Row(0, packed[:1], right=440)]


def test_blocks_without_an_edge_are_left_out() -> None:
    layout = layout_of(long_rows())
    blocks = block_mask(layout)
    edges = sdpa_mask(layout)
    rows = edges.shape[0]
    count = blocks.kv_num_blocks.shape[-1]
    padded = torch.zeros(rows, 1, count * 128, count * 128, dtype=torch.bool)
    padded[..., : edges.shape[-1], : edges.shape[-1]] = edges
    tiles = padded.view(rows, 1, count, 128, count, 128)
    assert blocks.to_dense().bool().tolist() == tiles.any(-1).any(3).tolist()
    assert blocks.sparsity() > 50


# --- draws


def test_draws_follow_the_probability_and_show_the_question() -> None:
    rng = random.Random(0)
    probabilities = skip_probabilities(0.3, {"response": {"analysis": 0.9}}, STEPS)
    drawn = torch.stack([draw_visibility([1, 2, 3], probabilities, rng) for _ in range(4000)])
    assert drawn[:, :, 0].all() and drawn[:, range(4), range(4)].all()
    share = 1 - drawn[:, [2, 3, 3], [1, 1, 2]].float().mean(0)
    torch.testing.assert_close(share, torch.tensor([0.3, 0.9, 0.3]), atol=0.03, rtol=0)
    assert draw_visibility([1, 2, 3], skip_probabilities(0.0, {}, STEPS), rng).all()


@pytest.mark.parametrize(
    ("pairs", "complaint"),
    [
        ({"response": {"analysis": 1.5}}, r"train\.skip_pairs\.response\.analysis=1\.5: use a probability from 0 to 1"),
        ({"analysis": {"response": 0.5}}, r"train\.skip_pairs\.analysis\.response=0\.5: name a later step, then"),
        ({"answer": {"analysis": 0.5}}, "of analysis, guidance, response"),
    ],
)
def test_wrong_pairs_are_named(pairs: dict[str, dict[str, float]], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        skip_probabilities(0.2, pairs, STEPS)


PAIRS = ((2, 1), (3, 1), (3, 2))
NAMES = {1: "a", 2: "g", 3: "y"}


def visibility_without(hidden: tuple[tuple[int, int], ...]) -> Tensor:
    visibility = torch.ones(4, 4, dtype=torch.bool)
    for later, earlier in hidden:
        visibility[later, earlier] = False
    return visibility


def token_losses(model: Any, rows: list[list[DrawnChain]]) -> tuple[Tensor, dict[str, Tensor]]:
    batch = collate(rows, pad_id=0)
    mask = sdpa_mask(Layout(batch["step_ids"], batch["visibility"], batch["document_ids"]))
    inputs = {key: batch[key] for key in batch if key not in ("labels", "visibility", "segment_ids", "weights")}
    logits = model(**inputs, attention_mask=mask).logits
    labels = batch["labels"][:, 1:]
    return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none"), batch


def step_loss(model: Any, chain: Unrolled, visibility: Tensor, step: int, markers: bool = False) -> Tensor:
    """Mean loss of a step's text and end marker, or that of its start marker; packed behind another chain, padded."""
    other = DrawnChain(chain_of(1, 3), visibility_without(()), 3)
    losses, batch = token_losses(model, [[other, DrawnChain(chain, visibility, 2)], [other] * 3])
    losses, steps, documents, ids = losses[0], *(batch[key][0, 1:] for key in ("step_ids", "document_ids", "input_ids"))
    own = (documents == 1) & (steps == step) & (ids != END_OF_TURN)
    start = ids == TEXTS[step][0]
    return losses[own & (start if markers else ~start)].mean()


@pytest.mark.parametrize("hidden", [h for n in range(4) for h in itertools.combinations(PAIRS, n)], ids=str)
def test_each_variant_in_a_masked_row_equals_the_built_chain(hidden: tuple[tuple[int, int], ...]) -> None:
    """Exactness: all 8 draws of (x, a, g, y), each step against the chain of what it sees.

    Between them they hold (x, a), (x, g), (x, y), (x, a, g), (x, a, y), (x, g, y) and the whole chain. A step that sees
    another one which saw more, or less, than it would in the built chain has no equal.
    """
    model = adapted()
    visibility = visibility_without(hidden)
    for step in NAMES:
        seen = [s for s in range(1, step + 1) if visibility[step, s]]
        built = step_loss(model, chain_of(*seen), visibility_without(()), step)
        masked = step_loss(model, chain_of(1, 2, 3), visibility, step)
        second_hand = any(
            (earlier in seen) != bool(visibility[s, earlier]) for s in seen[:-1] for earlier in range(1, s)
        )
        assert second_hand == (
            step == 3 and bool(visibility[3, 2]) and bool(visibility[2, 1]) != bool(visibility[3, 1])
        )
        if second_hand:
            assert abs(masked - built) > 1e-3
        else:
            assert abs(masked - built) < 1e-5


def test_hidden_steps_do_matter() -> None:
    """The negative control: with everything visible the same tokens have another loss."""
    model = adapted()
    chain = chain_of(1, 2, 3)
    whole = step_loss(model, chain, visibility_without(()), 3)
    for hidden in (((3, 1),), ((3, 2),), ((3, 1), (3, 2))):
        assert abs(step_loss(model, chain, visibility_without(hidden), 3) - whole) > 1e-2


def test_the_next_step_is_learnt_from_the_chain_as_generated() -> None:
    """A start marker is predicted by the token before it, so a response that sees nothing does not teach to skip."""
    model = adapted()
    chain = chain_of(1, 2, 3)
    made = step_loss(model, chain, visibility_without(()), 3, markers=True)
    skipping = step_loss(model, chain, visibility_without(((3, 1), (3, 2))), 3, markers=True)
    direct = step_loss(model, chain_of(3), visibility_without(()), 3, markers=True)
    assert abs(skipping - made) < 1e-5 < 1e-2 < abs(direct - made)


def test_seeing_everything_is_plain_causal_attention() -> None:
    model = adapted()
    chain = chain_of(1, 2, 3)
    losses, _ = token_losses(model, [[DrawnChain(chain, visibility_without(()), 2)]])
    ids = torch.tensor([chain.ids])
    plain = model(input_ids=ids, step_ids=torch.tensor([chain.steps]), question_experts=torch.tensor([2])).logits
    wanted = torch.nn.functional.cross_entropy(plain[0, :-1], torch.tensor(chain.labels)[1:], reduction="none")
    torch.testing.assert_close(losses[0], wanted, atol=1e-5, rtol=0)


def test_a_whole_model_is_the_same_with_all_masks() -> None:
    """Packed rows through transformers' own FlexAttention, which takes the block mask as it is: logits, gradients."""
    model = adapted().train()
    drawn = [
        DrawnChain(chain_of(1, 2, 3), visibility_without(((3, 1),)), 1),
        DrawnChain(chain_of(3), visibility_without(()), 2),
        DrawnChain(chain_of(1, 3), visibility_without(((3, 1),)), 3),
    ]
    batch = collate([drawn[:2], drawn[2:]], pad_id=0)
    layout = Layout(batch.pop("segment_ids"), batch.pop("visibility"), batch["document_ids"])
    del batch["weights"]
    found = []
    masks = {"sdpa": sdpa_mask, "flex_attention": block_mask, GROUPED_SDPA: document_mask}
    for name, mask in masks.items():
        model.base_model.model.set_attn_implementation(name)
        model.zero_grad()
        model(**batch, attention_mask=mask(layout)).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert len(found[0]) > 10 and any(grad.abs().max() > 1e-3 for grad in found[0])
    for first, *others in zip(*found, strict=True):
        for other in others:
            torch.testing.assert_close(first, other, atol=1e-5, rtol=1e-4)
