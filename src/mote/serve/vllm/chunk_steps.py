"""The step of each token of a batch of chunks, from its ids and from what was kept of the tokens before.

The same function as `mote.tokens.routing.step_ids`, cut where vLLM cuts: a chunk is some tokens of one request, and
what came before it is the step of the last token before it. Tensors only, nothing is read on the host.
Shapes: T token of the batch, N chunk, V vocabulary.
"""

import torch
from torch import Tensor

from mote.tokens.routing import QUESTION, Markers

_NONE = -1  # a token that opens nothing


def event_table(markers: Markers, vocab_size: int) -> Tensor:
    """What each token opens (V,) int8: a step, the question, or nothing."""
    table_V = torch.full((vocab_size,), _NONE, dtype=torch.int8)
    table_V[list(markers.turns)] = QUESTION
    for step, start in enumerate(markers.starts, QUESTION + 1):
        table_V[start] = step
    return table_V


def chunk_steps(ids_T: Tensor, first_T: Tensor, before_T: Tensor, events_V: Tensor) -> Tensor:
    """Steps of the tokens of a batch.

    Args:
        ids_T: Token ids, one chunk behind the other.
        first_T: Index of the first token of each token's chunk.
        before_T: Step of the token before each token's chunk; the question where none is.
        events_V: From `event_table`.

    Returns:
        Steps (T,) of the dtype of `before_T`: that of the last marker at or before a token in its own chunk, else the
        one before the chunk.
    """
    event_T = events_V[ids_T]
    index_T = torch.arange(len(ids_T), device=ids_T.device)
    last_T = torch.where(event_T != _NONE, index_T, -1).cummax(0).values
    return torch.where(last_T >= first_T, event_T[last_T.clamp_min(0)].to(before_T.dtype), before_T)
