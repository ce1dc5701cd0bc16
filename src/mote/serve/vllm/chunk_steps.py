"""Step ids of a batch of chunks, from the token ids and the step before each chunk.

Computes `mote.tokens.routing.step_ids` chunk by chunk: a chunk is a run of consecutive tokens of one request, and its
only history is the step of the token before it. Tensor operations only, no host sync.
Shapes: T token of the batch, V vocabulary.
"""

import torch
from torch import Tensor

from mote.tokens.routing import QUESTION, Markers

_NONE = -1  # not a marker: the step stays


def event_table(markers: Markers, vocab_size: int) -> Tensor:
    """The step that each token id starts (V,) int8: a step, the question, or `_NONE`."""
    table_V = torch.full((vocab_size,), _NONE, dtype=torch.int8)
    table_V[list(markers.turns)] = QUESTION
    for step, start in enumerate(markers.starts, QUESTION + 1):
        table_V[start] = step
    return table_V


def chunk_steps(ids_T: Tensor, first_T: Tensor, before_T: Tensor, events_V: Tensor) -> Tensor:
    """Step id of each token of a batch.

    Args:
        ids_T: Token ids of all chunks, concatenated.
        first_T: For each token, the index of the first token of its chunk.
        before_T: For each token, the step before its chunk; `QUESTION` at the start of a request.
        events_V: From `event_table`.

    Returns:
        Steps (T,) in the dtype of `before_T`: the step of the last marker at or before the token in its chunk, else
        the step before the chunk.
    """
    event_T = events_V[ids_T]
    index_T = torch.arange(len(ids_T), device=ids_T.device)
    last_T = torch.where(event_T != _NONE, index_T, -1).cummax(0).values
    return torch.where(last_T >= first_T, event_T[last_T.clamp_min(0)].to(before_T.dtype), before_T)
