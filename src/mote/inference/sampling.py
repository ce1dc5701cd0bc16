"""Sampling: each draw depends on its sequence alone, so a sequence reads the same in any batch.

Shapes: B row, V vocabulary.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from mote.core.generation import Sampling

_TOP_K = 50  # the nucleus is sought among these; sorting a whole vocabulary costs more than a small model on a CPU


def draw(scores_B_V: Tensor, samplings: Sequence[Sampling], generated: Sequence[int]) -> Tensor:
    """The next token of each sequence (B).

    Args:
        scores_B_V: Logits.
        samplings: Of each sequence; temperature 0 takes the most likely token.
        generated: Tokens each sequence has generated so far: with its seed, all that its draw depends on.
    """
    if not any(sampling.temperature for sampling in samplings):
        return scores_B_V.argmax(-1)
    device = scores_B_V.device
    uniform = [
        random.Random(f"{sampling.seed}/{step}").random() for sampling, step in zip(samplings, generated, strict=True)
    ]
    u_B_1 = torch.tensor(uniform, device=device)[:, None]
    temperature_B_1 = torch.tensor([sampling.temperature for sampling in samplings], device=device)[:, None]
    top_p_B_1 = torch.tensor([sampling.top_p for sampling in samplings], device=device)[:, None]
    top, ids = scores_B_V.float().topk(min(_TOP_K, scores_B_V.shape[-1]), dim=-1)
    probability = (top / torch.where(temperature_B_1 > 0, temperature_B_1, 1)).softmax(-1)
    before = probability.cumsum(-1) - probability
    kept = torch.where(before < top_p_B_1, probability, 0)
    cumulative = kept.cumsum(-1) / kept.sum(-1, keepdim=True)
    index = (cumulative <= u_B_1).sum(-1, keepdim=True).clamp_max((kept > 0).sum(-1, keepdim=True) - 1)
    return ids.gather(1, torch.where(temperature_B_1 > 0, index, 0))[:, 0]
