"""Attention mask and position ids under step skipping (section 3.2, figure 3).

With probability p a later step may not attend to an earlier one, so one pass over (x, a, g, y) also trains the shorter
chains. A step's positions start right after the last token it can see, so a response that skips everything is computed
exactly as a direct answer is (docs/decisions/0004). A row may hold several chains, its documents; none sees another.
Shapes: B row, T token, S step (the question counts as step 0), G segment: a step, of one of the draws if a chain has
several (`mote.tokens.packing`).
"""

import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from mote.core.errors import UserError
from mote.models.attention import DocumentMask

PADDING = -1  # the document of padding
Edge = Callable[[Any, Any, Any, Any], Tensor]  # (row, head, query, key) -> whether the query may attend to the key


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


def edge(segments_B_T: Tensor, visibility_B_T_G: Tensor, documents_B_T: Tensor) -> Edge:
    """The rule from which every form of the mask is made; it takes indices or tensors of them.

    Args:
        segments_B_T: Segment of each token.
        visibility_B_T_G: Which segments of its chain each token sees.
        documents_B_T: The chain of its row that each token is in; `PADDING` for padding.

    Returns:
        The rule. Every token sees itself, padding too, so that no softmax is empty.
    """

    def may_see(row: Any, head: Any, query: Any, key: Any) -> Tensor:
        document = documents_B_T[row, query]
        same = (document == documents_B_T[row, key]) & (document != PADDING)
        seen: Tensor = same & (key <= query) & visibility_B_T_G[row, query, segments_B_T[row, key]] | (query == key)
        return seen

    return may_see


def sdpa_mask(segments_B_T: Tensor, visibility_B_T_G: Tensor, documents_B_T: Tensor) -> Tensor:
    """The mask for SDPA: (B, 1, T, T) bool, `[query, key]`. Arguments as in `edge`."""
    rows, length = segments_B_T.shape
    row = torch.arange(rows, device=segments_B_T.device)[:, None, None, None]
    token = torch.arange(length, device=segments_B_T.device)
    return edge(segments_B_T, visibility_B_T_G, documents_B_T)(row, 0, token[:, None], token)


def document_mask(segments_B_T: Tensor, visibility_B_T_G: Tensor, documents_B_T: Tensor) -> DocumentMask:
    """`sdpa_mask` with its documents, for attention on a CPU (`mote.models.attention`); arguments as in `edge`.

    A document whose steps all see everything is marked as plainly causal.
    """
    mask = sdpa_mask(segments_B_T, visibility_B_T_G, documents_B_T).as_subclass(DocumentMask)
    mask.documents = []
    for documents_T, visibility_T_G in zip(documents_B_T, visibility_B_T_G, strict=True):
        numbers, lengths = torch.unique_consecutive(documents_T, return_counts=True)
        seen = visibility_T_G.all(-1).split(lengths.tolist())
        mask.documents.append(
            [
                (len(part), number == PADDING or bool(part.all()))
                for number, part in zip(numbers.tolist(), seen, strict=True)
            ]
        )
    return mask


def block_mask(segments_B_T: Tensor, visibility_B_T_G: Tensor, documents_B_T: Tensor) -> BlockMask:
    """The mask for FlexAttention, which skips blocks without an edge. Arguments as in `edge`."""
    rows, length = segments_B_T.shape
    rule = edge(segments_B_T, visibility_B_T_G, documents_B_T)
    return create_block_mask(rule, rows, None, length, length, device=segments_B_T.device)
