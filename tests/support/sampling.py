"""The running batch's sampling for transformers' `generate`."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from mote.core.generation import Sampling
from mote.inference.sequence import draw


class SeededSampler(LogitsProcessor):
    """Draws the next token of each row as the running batch does and leaves it as the only choice for greedy search.

    Args:
        samplings: Of each row (B).
        prompt_length: Tokens of the padded prompt.
    """

    def __init__(self, samplings: Sequence[Sampling], prompt_length: int) -> None:
        self.samplings = samplings
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) with all but the drawn token at minus infinity."""
        generated = input_ids.shape[1] - self.prompt_length
        tokens = draw(scores, self.samplings, [generated] * len(self.samplings))
        return torch.full_like(scores, float("-inf")).scatter(1, tokens[:, None], 0.0)
