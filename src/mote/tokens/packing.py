"""Chains -> batches: the draws of an epoch, chains packed into rows, rows padded into a batch.

It knows nothing of the model. A chain's draws depend on the seed, the epoch and the chain alone, so they are the same
whether it is packed or not (docs/decisions/0016). Over epochs they spread evenly (docs/decisions/0038).
Shapes: B row, T token, S step, G segment (`mote.tokens.packing`).
"""

import random
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from mote.tokens.encode import IGNORED, Tokens
from mote.tokens.masks import PADDING, draw_sight, positions
from mote.tokens.routing import QUESTION


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
        chances_S_S: `mote.tokens.masks.skip_chances`.
    """
    for place, step in enumerate(present):
        if any(0 < chances_S_S[step, earlier] < 1 for earlier in present[:place]):
            return list(present[place:])
    return []


def unroll(tokens: Tokens, chances_S_S: Tensor, views: int) -> Unrolled:
    """Repeat what views can differ in.

    Args:
        tokens: The chain.
        chances_S_S: `mote.tokens.masks.skip_chances`.
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
        sights_V: `mote.tokens.masks.draw_sight` of each view, (S, S).
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


GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, lie as evenly as multiples of one number can, however many


@dataclass(frozen=True)
class DrawnChain:
    """A chain with its draws of one epoch.

    Attributes:
        tokens: Its ids, labels and steps, each view of it behind the other.
        sight: Which of its segments see which (G, G).
        question_expert: Step whose expert reads the question.
    """

    tokens: Unrolled
    sight: Tensor
    question_expert: int


class ChainDataset(Dataset[list[DrawnChain]]):
    """Rows of one or several chains, with the draws of this epoch."""

    def __init__(
        self, chains: Sequence[Tokens], chances_S_S: Tensor, seed: int, row_length: int | None = None, views: int = 1
    ) -> None:
        """Rows of one chain each, or packed ones where a row's length is given.

        Args:
            chains: Tokenised chains, with their views none longer than a row.
            chances_S_S: `mote.tokens.masks.skip_chances`.
            seed: Seed of the draws.
            row_length: Room for tokens in a packed row.
            views: Draws of each chain.
        """
        self.chains = [unroll(chain, chances_S_S, views) for chain in chains]
        self.chances_S_S, self.seed, self.row_length, self.views = chances_S_S, seed, row_length, views
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of each epoch."""
        self.epoch = epoch
        self.rows = [[index] for index in range(len(self.chains))]
        if self.row_length is not None:
            rng = random.Random(f"{self.seed}/{epoch}/rows")
            self.rows = pack([len(chain.ids) for chain in self.chains], self.row_length, rng)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> list[DrawnChain]:
        return [self._draw(index) for index in self.rows[row]]

    def _draw(self, index: int) -> DrawnChain:
        """Numbers are drawn once for a chain; epochs and views shift them, so that draws spread evenly over both."""
        tokens, experts = self.chains[index], len(self.chances_S_S) - 1
        present = sorted(set(tokens.steps) - {QUESTION})
        sights = []
        for view in range(self.views):
            rng, shift = random.Random(f"{self.seed}/{index}"), self.epoch * GOLDEN + view / self.views
            sights.append(draw_sight(present, self.chances_S_S, rng, shift))
        turns = random.Random(f"{self.seed}/{index}/question").sample(range(1, experts + 1), experts)
        sight = join_sights(sights, repeated(present, self.chances_S_S))
        return DrawnChain(tokens, sight, turns[self.epoch % experts])


def pack(lengths: Sequence[int], room: int, rng: random.Random) -> list[list[int]]:
    """Put sequences into few rows of about the same length.

    How many rows there are depends on the lengths alone; which of equally long sequences go together is drawn.

    Args:
        lengths: Tokens of each sequence, at most `room`.
        room: Tokens a row can hold.
        rng: Source of the draw.

    Returns:
        The indices of each row's sequences; every one whole, in exactly one row.
    """
    order = list(range(len(lengths)))
    rng.shuffle(order)
    order.sort(key=lambda index: -lengths[index])
    fewest = len(_best_fit(lengths, room, order))
    # The least room that needs no more rows: else the last row may be nearly empty, and its batch nearly all padding.
    rooms = range(max(lengths), room)
    least = bisect_left(rooms, True, key=lambda width: len(_best_fit(lengths, width, order)) <= fewest)
    return _best_fit(lengths, max(lengths) + least, order)


def _best_fit(lengths: Sequence[int], room: int, order: Sequence[int]) -> list[list[int]]:
    """Put sequences into rows, in this order, each where it leaves least room."""
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # room left and number of each row, in ascending order
    for index in order:
        at = bisect_left(spaces, (lengths[index], 0))
        if at == len(spaces):
            rows.append([])
            spaces.append((room, len(rows) - 1))
        space, row = spaces.pop(at)
        rows[row].append(index)
        insort(spaces, (space - lengths[index], row))
    return rows


def collate(rows: Sequence[Sequence[DrawnChain]], pad_id: int) -> dict[str, Tensor]:
    """Join the chains of each row and pad rows on the right.

    Returns:
        What the model's forward takes, (B, T), `question_experts` of each token among it; for the mask `segment_ids`
        (B, T) and `sight` (B, T, G), which segments of its chain each token sees; and `weights` (B, T) of the loss.
    """

    def batch(of: Callable[[DrawnChain], list[int] | list[float] | Tensor], fill: int) -> Tensor:
        return pad_sequence([torch.cat([torch.as_tensor(of(chain)) for chain in row]) for row in rows], True, fill)

    documents = [[d for d, chain in enumerate(row) for _ in chain.tokens.ids] for row in rows]
    return {
        "input_ids": batch(lambda chain: chain.tokens.ids, pad_id),
        "labels": batch(lambda chain: chain.tokens.labels, IGNORED),
        "position_ids": batch(lambda chain: positions(torch.tensor(chain.tokens.segments), chain.sight), 0),
        "step_ids": batch(lambda chain: chain.tokens.steps, QUESTION),
        "document_ids": pad_sequence([torch.tensor(row) for row in documents], True, PADDING),
        "segment_ids": batch(lambda chain: chain.tokens.segments, QUESTION),
        "sight": batch(lambda chain: chain.sight[chain.tokens.segments], False),
        "weights": batch(lambda chain: chain.tokens.weights, 0),
        "question_experts": batch(lambda chain: [chain.question_expert] * len(chain.tokens.ids), QUESTION),
    }
