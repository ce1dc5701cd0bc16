"""Sampling whose draws belong to the row, so that a row reads the same in any batch.

Shapes: B row, V vocabulary.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

_TOP_K = 50  # the nucleus is looked for among these; sorting a whole vocabulary costs more than the model on a CPU


class SeededSampler(LogitsProcessor):
    """Draws each row's next token from its own seed and leaves it the only choice for greedy search.

    Args:
        seeds: One seed a row (B).
        prompt_length: Tokens of the padded prompt; the draw depends on the seed and the number of tokens since.
        temperature: Above 0.
        top_p: Nucleus: the fewest most likely tokens that hold this much of the probability.
    """

    def __init__(self, seeds: Sequence[int], prompt_length: int, temperature: float, top_p: float) -> None:
        self.seeds, self.prompt_length, self.temperature, self.top_p = seeds, prompt_length, temperature, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) with all but the drawn token at minus infinity."""
        step = input_ids.shape[1] - self.prompt_length
        draws = [random.Random(f"{seed}/{step}").random() for seed in self.seeds]
        top, ids = (scores.float() / self.temperature).topk(min(_TOP_K, scores.shape[-1]), dim=-1)
        probability = top.softmax(-1)
        before = probability.cumsum(-1) - probability
        kept = torch.where(before < self.top_p, probability, 0)
        share = kept.cumsum(-1) / kept.sum(-1, keepdim=True)
        place = (share <= torch.tensor(draws, device=scores.device)[:, None]).sum(-1, keepdim=True)
        chosen = ids.gather(1, place.clamp_max((kept > 0).sum(-1, keepdim=True) - 1))
        return torch.full_like(scores, float("-inf")).scatter(1, chosen, 0.0)
