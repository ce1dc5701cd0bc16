"""Step skipping: which token may see which, and where each step then stands (section 3.2, figure 3).

With probability p a later step may not attend to an earlier one, so one pass over (x, a, g, y) also trains the shorter
chains. A step's positions start right after the last token it can see, so a response that skips everything is computed
exactly as a direct answer is (docs/decisions/0004).
Shapes: B row, T token, S step (the question counts as step 0).
"""

import random

import torch
from torch import Tensor

from mote.routing import QUESTION


def draw_sight(present: list[int], steps: int, skip_p: float, rng: random.Random) -> Tensor:
    """Draw which steps see which for one row.

    Args:
        present: Step ids of the row's reasoning steps, in order.
        steps: Number of reasoning steps of the scheme.
        skip_p: Chance that a later step loses sight of an earlier one, for each ordered pair on its own.
        rng: Source of the draw.

    Returns:
        (S, S) bool, `[later, earlier]`; the question and a step itself are always seen.
    """
    sight = torch.ones(steps + 1, steps + 1, dtype=torch.bool)
    for i, earlier in enumerate(present):
        for later in present[i + 1 :]:
            sight[later, earlier] = rng.random() >= skip_p
    return sight


def attention_edges(steps_B_T: Tensor, sight_B_S_S: Tensor, valid_B_T: Tensor) -> Tensor:
    """Which query may attend to which key, as SDPA takes it.

    Args:
        steps_B_T: Step of each token.
        sight_B_S_S: `draw_sight` of each row.
        valid_B_T: False for padding.

    Returns:
        (B, 1, T, T) bool, `[query, key]`. A token always sees itself, padding too, so that no softmax is empty.
    """
    rows, length = steps_B_T.shape
    row = torch.arange(rows, device=steps_B_T.device)[:, None, None]
    seen = sight_B_S_S[row, steps_B_T[:, :, None], steps_B_T[:, None, :]]
    causal = torch.ones(length, length, dtype=torch.bool, device=steps_B_T.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=steps_B_T.device)
    return ((seen & causal & valid_B_T[:, None, :]) | itself)[:, None]


def positions(steps_B_T: Tensor, sight_B_S_S: Tensor, valid_B_T: Tensor) -> Tensor:
    """Position of each token (B, T): its step starts right after the last token that the step can see.

    Takes the arguments of `attention_edges`; a row holds one chain whose steps stand in the order of their ids.
    Padding has position 0.
    """
    steps = sight_B_S_S.shape[1]
    # index_B_T: how many valid tokens of the same step stand before; length_B_S: how long each step is.
    member_B_T_S = torch.nn.functional.one_hot(steps_B_T, steps) * valid_B_T[:, :, None]
    index_B_T = (member_B_T_S.cumsum(1) - 1).gather(2, steps_B_T[:, :, None])[:, :, 0]
    length_B_S = member_B_T_S.sum(1)
    start_B_S = torch.zeros_like(length_B_S)
    for step in range(QUESTION + 1, steps):
        ends_B_S = (start_B_S + length_B_S)[:, :step] * sight_B_S_S[:, step, :step] * (length_B_S[:, :step] > 0)
        start_B_S[:, step] = ends_B_S.max(1).values
    return (start_B_S.gather(1, steps_B_T) + index_B_T) * valid_B_T
