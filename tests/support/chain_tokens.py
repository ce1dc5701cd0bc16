"""Chains as token ids."""

import random

import torch

from mote.tokens.encode import IGNORED, Tokens
from mote.tokens.packing import Unrolled, unroll

# --- one masked row against chains that are really built

QUESTION = [5, 6, 7, 8]
TEXTS = {1: [64, 9, 10, 65], 2: [66, 10, 11, 12, 67], 3: [68, 12, 13, 14, 69]}
END_OF_TURN = 1


def chain_of(*steps: int) -> Unrolled:
    written = [id_ for step in steps for id_ in TEXTS[step]] + [END_OF_TURN]
    ids = [0] * len(QUESTION) + [step for step in steps for _ in TEXTS[step]] + [steps[-1]]
    return unroll(Tokens(QUESTION + written, [IGNORED] * len(QUESTION) + written, ids), torch.zeros(4, 4), 1)


def some_chains(count: int, seed: int = 0) -> list[Tokens]:
    """Chains of the tiny model's markers, of random steps and lengths."""
    rng = random.Random(seed)

    def text(longest: int) -> list[int]:
        return [rng.randrange(3, 60) for _ in range(rng.randint(1, longest))]

    chains = []
    for _ in range(count):
        question = text(9)
        ids = list(question)
        steps = [0] * len(question)
        labels = [IGNORED] * len(question)
        for step in rng.choice([(3,), (1, 3), (1, 2, 3)]):
            part = [62 + 2 * step, *text(12), 63 + 2 * step]
            ids, labels, steps = ids + part, labels + part, steps + [step] * len(part)
        chains.append(Tokens(ids, labels, steps))
    return chains
