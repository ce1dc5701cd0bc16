"""Attention mask and position ids under step skipping (section 3.2, figure 3).

With probability p a later step may not attend to an earlier one, so one pass over (x, a, g, y) also trains the shorter
chains. A step's positions start right after the last token it can see, so a response that skips everything is computed
exactly as a direct answer is (docs/decisions/0004). A row may hold several chains, its documents; none sees another.
Layers with a window or chunks see what lies in both: the visible steps and, by positions, the window.
Shapes: B row, T token, S step (the question counts as step 0), G segment: a step, of one of the draws if a chain has
several (`mote.tokens.packing`).
"""

import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from mote.core.errors import UserError
from mote.models.attention import GROUPED_SDPA, DocumentMask
from mote.models.layers import Layer, masked_kinds

PADDING = -1  # the document of padding
WHOLE_ROW = Layer("full_attention", "full")
Edge = Callable[[Any, Any, Any, Any], Tensor]  # (row, head, query, key) -> whether the query may attend to the key


class Layout(NamedTuple):
    """Where each token of a batch stands, and what it may see.

    Attributes:
        segments_B_T: Segment of each token.
        visibility_B_T_G: Which segments of its chain each token sees.
        documents_B_T: The chain of its row that each token is in; `PADDING` for padding.
        positions_B_T: Position of each token, for layers with a window or chunks, which count by it.
    """

    segments_B_T: Tensor
    visibility_B_T_G: Tensor
    documents_B_T: Tensor
    positions_B_T: Tensor | None = None

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> "Layout":
        """The layout of a batch that `mote.tokens.packing.collate` made."""
        return cls(batch["segment_ids"], batch["visibility"], batch["document_ids"], batch["position_ids"])


MaskForm = Callable[[Layout, Layer], Any]  # -> the mask of one kind of layer
MakeMask = Callable[[Layout], Any]  # -> the masks of a model


def skip_probabilities(skip_p: float, pairs: Mapping[str, Mapping[str, float]], steps: tuple[str, ...]) -> Tensor:
    """Probability that a step cannot see an earlier one.

    Args:
        skip_p: Probability for every ordered pair of reasoning steps that is not in `pairs`.
        pairs: Probabilities of single pairs, `{later: {earlier: probability}}`.
        steps: The scheme's steps in order.

    Returns:
        (S, S), `[later, earlier]`; 0 for the question, the step itself and later steps.

    Raises:
        UserError: An unknown step, a pair in the wrong order, or a probability outside 0 to 1.
    """
    probabilities_S_S = torch.full((len(steps) + 1, len(steps) + 1), skip_p).tril(-1)
    probabilities_S_S[:, 0] = 0
    for later, of_earlier in pairs.items():
        for earlier, probability in of_earlier.items():
            setting = f"recipe: train.skip_pairs.{later}.{earlier}={probability}"
            if later not in steps or earlier not in steps or steps.index(earlier) >= steps.index(later):
                raise UserError(f"{setting}: name a later step, then an earlier one, of {', '.join(steps)}")
            if not 0 <= probability <= 1:
                raise UserError(f"{setting}: use a probability from 0 to 1")
            probabilities_S_S[steps.index(later) + 1, steps.index(earlier) + 1] = probability
    return probabilities_S_S


def draw_visibility(present: list[int], probabilities_S_S: Tensor, rng: random.Random, shift: float = 0.0) -> Tensor:
    """Draw which steps of one chain see which.

    Args:
        present: Step ids of the chain's reasoning steps, in order.
        probabilities_S_S: `skip_probabilities`; each ordered pair is drawn independently.
        rng: Source of the draw.
        shift: Added to each random number, modulo 1. The draws of one chain use the same numbers with shifts spread
            evenly over 0 to 1 (systematic sampling): at probability 0.5 two draws are each other's complement.

    Returns:
        (S, S) bool, `[later, earlier]`; the question and the step itself are always visible.
    """
    visibility_S_S = torch.ones_like(probabilities_S_S, dtype=torch.bool)
    for i, earlier in enumerate(present):
        for later in present[i + 1 :]:
            visibility_S_S[later, earlier] = (rng.random() + shift) % 1 >= probabilities_S_S[later, earlier].item()
    return visibility_S_S


def positions(segments_T: Tensor, visibility_G_G: Tensor) -> Tensor:
    """Position of each token (T) of one chain: its step starts right after the last token that the step can see.

    Args:
        segments_T: Segment of each token.
        visibility_G_G: `draw_visibility` of the chain, or `mote.tokens.packing.segment_visibility` of its draws.
    """
    position_T = torch.zeros_like(segments_T)
    for segment, visibility_G in enumerate(visibility_G_G):
        own_T = segments_T == segment
        before_T = position_T[visibility_G[segments_T] & (segments_T < segment)]
        start = int(before_T.max()) + 1 if len(before_T) else 0
        position_T[own_T] = start + torch.arange(int(own_T.sum()))
    return position_T


def edge(layout: Layout, layer: Layer = WHOLE_ROW) -> Edge:
    """The rule from which every form of the mask is made; it takes indices or tensors of them.

    Args:
        layout: The batch.
        layer: The kind of layer that the mask is for.

    Returns:
        The rule. Every token sees itself, padding too, so that no softmax is empty.
    """
    segments_B_T, visibility_B_T_G, documents_B_T, positions_B_T = layout

    def may_see(row: Any, head: Any, query: Any, key: Any) -> Tensor:
        document = documents_B_T[row, query]
        same = (document == documents_B_T[row, key]) & (document != PADDING)
        near: Any = True
        if layer.reach is not None:
            assert positions_B_T is not None
            near = layer.within(positions_B_T[row, query], positions_B_T[row, key])
        visible = visibility_B_T_G[row, query, segments_B_T[row, key]]
        seen: Tensor = same & (key <= query) & visible & near | (query == key)
        return seen

    return may_see


def sdpa_mask(layout: Layout, layer: Layer = WHOLE_ROW) -> Tensor:
    """The mask for SDPA: (B, 1, T, T) bool, `[query, key]`."""
    rows, length = layout.segments_B_T.shape
    row = torch.arange(rows, device=layout.segments_B_T.device)[:, None, None, None]
    token = torch.arange(length, device=layout.segments_B_T.device)
    may_see = edge(layout, layer)
    return may_see(row, 0, token[:, None], token)


def eager_mask(layout: Layout, layer: Layer = WHOLE_ROW) -> Tensor:
    """The mask for transformers' `eager` attention, which adds it to the scores: (B, 1, T, T) float32."""
    mask = sdpa_mask(layout, layer)
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, torch.finfo(torch.float32).min)


def document_mask(layout: Layout, layer: Layer = WHOLE_ROW) -> DocumentMask:
    """`sdpa_mask` with its documents, for attention on a CPU (`mote.models.attention`).

    A document whose steps all see everything, and which fits into the layer's window or first chunk, is marked as
    plainly causal.
    """
    whole = sdpa_mask(layout, layer)
    mask = whole.as_subclass(DocumentMask)
    mask.documents = []
    seen_B_T = layout.visibility_B_T_G.all(-1)
    if layer.reach is not None:
        assert layout.positions_B_T is not None
        seen_B_T = seen_B_T & (layout.positions_B_T < layer.reach)
    for documents_T, seen_T in zip(layout.documents_B_T, seen_B_T, strict=True):
        numbers, lengths = torch.unique_consecutive(documents_T, return_counts=True)
        mask.documents.append(
            [
                (len(part), number == PADDING or bool(part.all()))
                for number, part in zip(numbers.tolist(), seen_T.split(lengths.tolist()), strict=True)
            ]
        )
    return mask


def block_mask(layout: Layout, layer: Layer = WHOLE_ROW) -> BlockMask:
    """The mask for FlexAttention, which skips blocks without an edge."""
    rows, length = layout.segments_B_T.shape
    rule = edge(layout, layer)
    return create_block_mask(rule, rows, None, length, length, device=layout.segments_B_T.device)


def mask_form(attention: str, compiled: bool = False) -> MaskForm:
    """What makes the masks for an attention implementation of transformers, by its name; `sdpa_mask` for others.

    Args:
        attention: `config._attn_implementation` of the model.
        compiled: Whether the model runs under torch.compile, which does not take `DocumentMask`.
    """
    forms: dict[str, MaskForm] = {"eager": eager_mask, "flex_attention": block_mask}
    if not compiled:
        forms[GROUPED_SDPA] = document_mask
    return forms.get(attention, sdpa_mask)


def masks_for(config: Any, form: MaskForm) -> MakeMask:
    """What makes a base model's masks: one, or a dict of one for each kind of its layers if these differ.

    transformers hands a single mask to every layer as it is, and with it the windows and chunks are lost: each mask
    must hold its layer's own.

    Args:
        config: The base model's configuration.
        form: Makes the mask of one kind of layer.
    """
    kinds = masked_kinds(config) or (WHOLE_ROW,)

    def make(layout: Layout) -> Any:
        longest = 0
        if any(layer.reach is not None for layer in kinds):
            assert layout.positions_B_T is not None
            longest = int(layout.positions_B_T.max()) + 1
        made: dict[Layer, Any] = {}  # a window that no token reaches the end of makes no second mask
        masks = {}
        for layer in kinds:
            bounded = layer if layer.reach is not None and layer.reach < longest else WHOLE_ROW
            if bounded not in made:
                made[bounded] = form(layout, bounded)
            masks[layer.name] = made[bounded]
        return masks if len(masks) > 1 else next(iter(masks.values()))

    return make
