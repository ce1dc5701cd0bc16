"""Weight of every expert for a token of every step (the equation of section 3.2).

Shapes: B row, T token, S step, E expert, R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mote.tokens.routing import QUESTION, document_starts
from mote.tuner.config import MoteConfig


def expert_weight_table(config: MoteConfig, device: torch.device | None = None) -> Tensor:
    """Weight of every expert for a token of every step (the equation of section 3.2).

    Returns:
        (1 + steps, E): row 0 is the question at inference, row s is step s. Column 0 is the shared expert where
        there is one, and all there is without step experts. Rows sum to 1.
    """
    steps = len(config.experts)
    if config.mix == 0:
        return torch.ones(steps + 1, 1, device=device)
    own = torch.eye(steps, device=device)
    if config.question_expert == "mean":
        question = torch.full((1, steps), 1 / steps, device=device)
    else:
        question = own[[config.experts.index(config.question_expert)]]
    weights = config.mix * torch.cat([question, own])
    if config.shared:
        weights = torch.cat([torch.full((steps + 1, 1), 1 - config.mix, device=device), weights], dim=1)
    return weights


def _with_question_experts(steps: Tensor, drawn: Tensor | None, documents: Tensor | None, experts: int) -> Tensor:
    """Replace the question's step 0 by one expert a sequence, as given or drawn at random ("processed by anyone")."""
    if drawn is not None:
        expert = drawn.to(steps.device).reshape(len(steps), -1)
    elif documents is not None:
        draws = torch.randint(1, experts + 1, steps.shape, device=steps.device)
        expert = draws.gather(1, document_starts(documents))
    else:
        expert = torch.randint(1, experts + 1, (steps.shape[0], 1), device=steps.device)
    return torch.where(steps == QUESTION, expert, steps)


Columns = tuple[tuple[slice, ...], Tensor]  # stretches of columns that count for a step, and their weights (2R)
Table = tuple[Tensor, Sequence[Columns]]  # weights of all columns for every step (1 + S + 1, E*R); those that count


@dataclass
class Route:
    """What the layers of one adapter and rank need to know of the running forward pass.

    Attributes:
        gate: Weight of every expert's columns for every token (B, T, E*R), scaling included.
        columns: The columns that count, for each step from the question on.
        idle: Whether it is known that no token has a step.
    """

    gate: Tensor
    columns: Sequence[Columns] = ()
    idle: bool = False


def active_columns(table: Tensor) -> list[Columns]:
    """The columns that count for each step, and their weights.

    Args:
        table: Weight of every column for every step, from the question on (1 + S, E*R), scaling included.
    """
    found = []
    for row in table:
        counts = (row != 0).int()
        edges = counts.diff(prepend=counts.new_zeros(1), append=counts.new_zeros(1)).nonzero().squeeze(1).tolist()
        found.append((tuple(map(slice, edges[::2], edges[1::2])), row[row != 0]))
    return found
