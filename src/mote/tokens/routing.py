"""Token ids to step ids: the one function that training, cached decoding, packing and serving share.

The step of a token is a pure function of the token ids up to it, so no routing state has to be carried.
Shapes: B row, T token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NO_STEP = -1  # step id of tokens without experts, in a batch whose other rows have some
QUESTION = 0  # the step id of the question; the reasoning steps are 1, 2, ... in the scheme's order


@dataclass(frozen=True)
class Markers:
    """Token ids that mark steps and turns.

    Attributes:
        starts: Start marker of each step, in order: `starts[i]` opens the step with id `i + 1`.
        ends: End marker of each step. Routing does not need them: an end marker belongs to its own step.
        turns: Special tokens between two turns; from one of them on, tokens belong to the question again.
        whole_rows: Every token of a sequence is routed as its last one.
        end_of_turn: Id that ends a chain in training, the tokenizer's eos if None. Routing does not need it.
    """

    starts: tuple[int, ...]
    ends: tuple[int, ...]
    turns: tuple[int, ...] = ()
    whole_rows: bool = False
    end_of_turn: int | None = None


def step_ids(
    ids_B_T: Tensor, markers: Markers, documents_B_T: Tensor | None = None, previous_B_1: Tensor | None = None
) -> Tensor:
    """The step of each token: that of the last start marker at or before it in its document.

    Before any start marker, and from a turn marker on, a token belongs to the question (section 3.2; the paper leaves
    the marker's own step open, see docs/decisions/0002).

    Args:
        ids_B_T: Token ids, from the first token of the sequence.
        markers: The ids that open a step or a turn.
        documents_B_T: For packed rows, the document number of each token; non-decreasing in a row.
        previous_B_1: Step of the token before the first, if `ids_B_T` continue a sequence.

    Returns:
        Step ids (B, T), 0 for the question.
    """
    event_B_T = torch.full_like(ids_B_T, -1)
    for turn in markers.turns:
        event_B_T = torch.where(ids_B_T == turn, QUESTION, event_B_T)
    for step, start in enumerate(markers.starts, QUESTION + 1):
        event_B_T = torch.where(ids_B_T == start, step, event_B_T)
    position_T = torch.arange(ids_B_T.shape[1], device=ids_B_T.device)
    last_B_T = torch.where(event_B_T >= 0, position_T, -1).cummax(dim=1).values
    if documents_B_T is not None:
        last_B_T = torch.where(last_B_T < document_starts(documents_B_T), -1, last_B_T)
    before: Tensor | int = QUESTION if previous_B_1 is None else previous_B_1
    steps_B_T = torch.where(last_B_T >= 0, event_B_T.gather(1, last_B_T.clamp_min(0)), before)
    if markers.whole_rows:
        documents_B_T = torch.zeros_like(ids_B_T) if documents_B_T is None else documents_B_T
        return steps_B_T.gather(1, document_ends(documents_B_T))
    return steps_B_T


def next_step(step: int, token: int, markers: Markers) -> int:
    """The step of a token that follows one of step `step`: `step_ids` for token-by-token decoding."""
    if token in markers.starts:
        return QUESTION + 1 + markers.starts.index(token)
    return QUESTION if token in markers.turns else step


def document_ends(documents_B_T: Tensor) -> Tensor:
    """Position of the last token of each token's document (B, T)."""
    return documents_B_T.shape[1] - 1 - document_starts(documents_B_T.flip(1)).flip(1)


def document_starts(documents_B_T: Tensor) -> Tensor:
    """Position of the first token of each token's document (B, T)."""
    position_T = torch.arange(documents_B_T.shape[1], device=documents_B_T.device)
    first_B_T = torch.ones_like(documents_B_T, dtype=torch.bool)
    first_B_T[:, 1:] = documents_B_T[:, 1:] != documents_B_T[:, :-1]
    return torch.where(first_B_T, position_T, 0).cummax(dim=1).values
