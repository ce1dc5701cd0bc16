"""Several views of one chain in one row: what step skipping can change stands in it once for each view.

One draw shows one of the chains that a chain stands for. With several, the question and the first step are read once;
each step that may lose sight of another, and what comes behind it, once for each view, and no view sees another
(docs/decisions/0038). One view is the chain as it is.
Shapes: T token, S step (the question counts as step 0), V view, G segment: a step in one of the views, S - 1 a view.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mote.routing import QUESTION
from mote.tokens import IGNORED, Tokens


@dataclass(frozen=True)
class Unrolled(Tokens):
    """A chain with as many views as it is drawn in.

    Attributes:
        segments: Segment of each token; those of the first view, and what all views share, are the steps.
        weights: Of the loss of each token: what views share counts 1, the rest 1 / V, so that the loss is the mean of
            those of the views as rows of their own.
    """

    segments: list[int]
    weights: list[float]


def repeated(present: Sequence[int], chances_S_S: Tensor) -> list[int]:
    """The steps of a chain that views can differ in: from the first on that may or may not see an earlier one.

    Args:
        present: Step ids of the chain's reasoning steps, in order.
        chances_S_S: `mote.masks.skip_chances`.
    """
    for place, step in enumerate(present):
        if any(0 < chances_S_S[step, earlier] < 1 for earlier in present[:place]):
            return list(present[place:])
    return []


def unroll(tokens: Tokens, chances_S_S: Tensor, views: int) -> Unrolled:
    """Repeat what views can differ in.

    Args:
        tokens: The chain.
        chances_S_S: `mote.masks.skip_chances`.
        views: How many.
    """
    present = sorted(set(tokens.steps) - {QUESTION})
    again = repeated(present, chances_S_S) if views > 1 else []
    steps_in_view, count = len(chances_S_S) - 1, len(tokens.ids)
    begin = next((place for place, step in enumerate(tokens.steps) if step in again), count)
    ids, labels, steps, segments = (list(each) for each in (tokens.ids, tokens.labels, tokens.steps, tokens.steps))
    # The token that begins a repeated part is predicted by the one before it, which is the same in all views.
    weights = [1.0] * min(begin + 1, count) + [1 / views] * (count - begin - 1)
    for view in range(1, views if again else 1):
        ids += tokens.ids[begin:]
        labels += [IGNORED, *tokens.labels[begin + 1 :]]
        steps += tokens.steps[begin:]
        segments += [step + view * steps_in_view for step in tokens.steps[begin:]]
        weights += [1 / views] * (count - begin)
    return Unrolled(ids, labels, steps, segments, weights)


def join_sights(sights_V: Sequence[Tensor], again: list[int]) -> Tensor:
    """Which segments see which (G, G), of what the steps of each view see.

    Args:
        sights_V: `mote.masks.draw_sight` of each view, (S, S).
        again: `repeated` of the chain.
    """
    steps_in_view, views = len(sights_V[0]) - 1, len(sights_V)
    sight_G_G = torch.ones(1 + views * steps_in_view, 1 + views * steps_in_view, dtype=torch.bool)
    sight_G_G[: 1 + steps_in_view, : 1 + steps_in_view] = sights_V[0]
    for view in range(1, views if again else 1):
        segments = torch.arange(1 + steps_in_view)  # of the steps as this view has them
        segments[again] += view * steps_in_view
        sight_G_G[segments[again]] = False
        sight_G_G[segments[again][:, None], segments] = sights_V[view][again]
    return sight_G_G
