"""Opens the loop that computes a base model's requests: continuous batching where its architecture allows it."""

import sys
from typing import Any

from mote.core.errors import UserError
from mote.core.machine import is_first_process
from mote.inference.batch_loop import BatchLoop
from mote.inference.batching import Batcher
from mote.inference.compare_base import checked
from mote.inference.sequential import SequentialLoop
from mote.tokens.routing import Markers


def open_batch(model: Any, slots: int, markers: Markers | None = None) -> BatchLoop:
    """The running batch, or, with a line that says so, a loop that computes one request at a time.

    Args:
        model: A causal language model, with or without an adapter.
        slots: Maximum number of sequences in the batch.
        markers: Markers of an adapter with step experts, None without one.

    Raises:
        UserError: The model does not read from left to right.
    """
    capabilities = checked(model.config)
    if (limit := capabilities.limits.get("training")) is not None:
        raise UserError(f"model: {limit}")
    if (limit := capabilities.limits.get("answers")) is None:
        return Batcher(model, slots, markers)
    if is_first_process():
        print(f"model: {limit}", file=sys.stderr)
    return SequentialLoop(model, markers)
