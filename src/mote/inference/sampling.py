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
        draws, rows = [(seed, step) for seed in self.seeds], len(self.seeds)
        chosen = draw(scores, draws, [self.temperature] * rows, [self.top_p] * rows)
        return torch.full_like(scores, float("-inf")).scatter(1, chosen[:, None], 0.0)


def draw(
    scores_B_V: Tensor, draws: Sequence[tuple[int, int]], temperatures: Sequence[float], top_ps: Sequence[float]
) -> Tensor:
    """The next token of each row (B).

    Args:
        scores_B_V: Logits.
        draws: Seed of each row and the number of tokens it has: all that its draw depends on.
        temperatures: Of each row; 0 takes the most likely token.
        top_ps: Nucleus of each row: the fewest most likely tokens that hold this much of the probability.
    """
    if not any(temperatures):
        return scores_B_V.argmax(-1)
    device = scores_B_V.device
    at = torch.tensor([random.Random(f"{seed}/{step}").random() for seed, step in draws], device=device)[:, None]
    temperature = torch.tensor(temperatures, device=device)[:, None]
    top, ids = scores_B_V.float().topk(min(_TOP_K, scores_B_V.shape[-1]), dim=-1)
    probability = (top / torch.where(temperature > 0, temperature, 1)).softmax(-1)
    before = probability.cumsum(-1) - probability
    kept = torch.where(before < torch.tensor(top_ps, device=device)[:, None], probability, 0)
    share = kept.cumsum(-1) / kept.sum(-1, keepdim=True)
    place = (share <= at).sum(-1, keepdim=True).clamp_max((kept > 0).sum(-1, keepdim=True) - 1)
    return ids.gather(1, torch.where(temperature > 0, place, 0))[:, 0]
