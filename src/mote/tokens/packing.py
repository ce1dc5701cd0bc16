"""Chains to batches: the visibility draws of an epoch, chains packed into rows, rows padded into a batch.

Knows nothing of the model. A chain's draws depend only on the seed, the epoch and the chain, so they are the same with
and without packing (docs/decisions/0016). Over epochs they spread evenly (docs/decisions/0038).
The draws of a chain share one row: what is the same in every draw is stored once, the rest once per draw. A segment is
a step of one draw; segments of the first draw, and those that all draws share, have the step's id.
Shapes: B row, T token, S step, G segment.
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
from mote.tokens.masks import PADDING, draw_visibility, positions
from mote.tokens.routing import QUESTION


@dataclass(frozen=True)
class Unrolled(Tokens):
    """A chain with all its draws in one sequence.

    Attributes:
        segments: Segment of each token.
        weights: Loss weight of each token: 1 for shared tokens, 1 / draws for the others, so that the loss is the mean
            of the losses that the draws would have in separate rows.
    """

    segments: list[int]
    weights: list[float]


def repeated_steps(present: Sequence[int], probabilities_S_S: Tensor) -> list[int]:
    """The steps in which draws of a chain can differ: the first whose visibility is random, and all after it.

    Args:
        present: Step ids of the chain's reasoning steps, in order.
        probabilities_S_S: `mote.tokens.masks.skip_probabilities`.
    """
    for index, step in enumerate(present):
        if any(0 < probabilities_S_S[step, earlier] < 1 for earlier in present[:index]):
            return list(present[index:])
    return []


def unroll(tokens: Tokens, probabilities_S_S: Tensor, draws: int) -> Unrolled:
    """Append the repeated steps of each further draw to a chain.

    Args:
        tokens: The chain.
        probabilities_S_S: `mote.tokens.masks.skip_probabilities`.
        draws: Number of draws.
    """
    steps_in_draw = len(probabilities_S_S) - 1
    count = len(tokens.ids)
    begin = _first_repeated(tokens, probabilities_S_S, draws)
    ids = list(tokens.ids)
    labels = list(tokens.labels)
    steps = list(tokens.steps)
    segments = list(tokens.steps)
    # The first repeated token is predicted by the token before it, which all draws share.
    weights = [1.0] * min(begin + 1, count) + [1 / draws] * (count - begin - 1)
    for draw in range(1, draws if begin < count else 1):
        ids += tokens.ids[begin:]
        labels += [IGNORED, *tokens.labels[begin + 1 :]]
        steps += tokens.steps[begin:]
        segments += [step + draw * steps_in_draw for step in tokens.steps[begin:]]
        weights += [1 / draws] * (count - begin)
    return Unrolled(ids, labels, steps, segments, weights)


def unrolled_length(tokens: Tokens, probabilities_S_S: Tensor, draws: int) -> int:
    """The number of tokens of `unroll`."""
    count = len(tokens.ids)
    return count + (draws - 1) * (count - _first_repeated(tokens, probabilities_S_S, draws))


def _first_repeated(tokens: Tokens, probabilities_S_S: Tensor, draws: int) -> int:
    """Index of the first token that further draws repeat; the number of tokens if they repeat none."""
    present = sorted(set(tokens.steps) - {QUESTION})
    again = repeated_steps(present, probabilities_S_S) if draws > 1 else []
    return next((index for index, step in enumerate(tokens.steps) if step in again), len(tokens.ids))


def segment_visibility(visibilities: Sequence[Tensor], again: list[int]) -> Tensor:
    """Which segments see which (G, G), from what the steps of each draw see.

    Args:
        visibilities: `mote.tokens.masks.draw_visibility` of each draw, (S, S).
        again: `repeated_steps` of the chain.
    """
    steps_in_draw = len(visibilities[0]) - 1
    draws = len(visibilities)
    visibility_G_G = torch.ones(1 + draws * steps_in_draw, 1 + draws * steps_in_draw, dtype=torch.bool)
    visibility_G_G[: 1 + steps_in_draw, : 1 + steps_in_draw] = visibilities[0]
    for draw in range(1, draws if again else 1):
        segments = torch.arange(1 + steps_in_draw)  # segment of each step in this draw
        segments[again] += draw * steps_in_draw
        visibility_G_G[segments[again]] = False
        visibility_G_G[segments[again][:, None], segments] = visibilities[draw][again]
    return visibility_G_G


GOLDEN = (5**0.5 - 1) / 2  # its multiples modulo 1 spread more evenly than those of any other number


@dataclass(frozen=True)
class DrawnChain:
    """A chain with its draws of one epoch.

    Attributes:
        tokens: Its ids, labels and steps, with the draws one after the other.
        visibility: Which of its segments see which (G, G).
        question_expert: Step whose expert reads the question.
    """

    tokens: Unrolled
    visibility: Tensor
    question_expert: int


class ChainDataset(Dataset[list[DrawnChain]]):
    """Rows of one or several chains, with the draws of the current epoch."""

    def __init__(
        self,
        chains: Sequence[Tokens],
        probabilities_S_S: Tensor,
        seed: int,
        row_length: int | None = None,
        draws: int = 1,
    ) -> None:
        """Rows of one chain each, or packed rows if `row_length` is given.

        Args:
            chains: Tokenised chains; with all draws none is longer than a row.
            probabilities_S_S: `mote.tokens.masks.skip_probabilities`.
            seed: Seed of the draws.
            row_length: Tokens of a packed row, at most.
            draws: Draws of each chain.
        """
        self.chains = [unroll(chain, probabilities_S_S, draws) for chain in chains]
        self.probabilities_S_S = probabilities_S_S
        self.seed = seed
        self.row_length = row_length
        self.draws = draws
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw again for an epoch; the data loader calls it at the start of each."""
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
        """Draw a chain; epochs and draws shift fixed random numbers, so that visibility spreads evenly over both."""
        tokens = self.chains[index]
        experts = len(self.probabilities_S_S) - 1
        present = sorted(set(tokens.steps) - {QUESTION})
        visibilities = []
        for draw in range(self.draws):
            rng = random.Random(f"{self.seed}/{index}")
            shift = self.epoch * GOLDEN + draw / self.draws
            visibilities.append(draw_visibility(present, self.probabilities_S_S, rng, shift))
        turns = random.Random(f"{self.seed}/{index}/question").sample(range(1, experts + 1), experts)
        visibility = segment_visibility(visibilities, repeated_steps(present, self.probabilities_S_S))
        return DrawnChain(tokens, visibility, turns[self.epoch % experts])


def pack(lengths: Sequence[int], room: int, rng: random.Random) -> list[list[int]]:
    """Pack sequences into few rows of similar length.

    The number of rows depends on the lengths alone; which of equally long sequences share a row is random.

    Args:
        lengths: Tokens of each sequence, at most `room`.
        room: Tokens that a row can hold.
        rng: Source of the random choice.

    Returns:
        The indices of each row's sequences; each sequence is in exactly one row, uncut.
    """
    order = list(range(len(lengths)))
    rng.shuffle(order)
    order.sort(key=lambda index: -lengths[index])
    fewest = len(_best_fit(lengths, room, order))
    # The smallest width that needs no more rows; otherwise the last row could be almost empty and its batch padding.
    rooms = range(max(lengths), room)
    least = bisect_left(rooms, True, key=lambda width: len(_best_fit(lengths, width, order)) <= fewest)
    return _best_fit(lengths, max(lengths) + least, order)


def _best_fit(lengths: Sequence[int], room: int, order: Sequence[int]) -> list[list[int]]:
    """Best-fit packing: each sequence in turn goes to the row where it leaves the least space."""
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (space left, row index) of each row, in ascending order
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
    """Concatenate the chains of each row and pad rows on the right.

    Returns:
        The arguments of the model's forward (B, T), with `question_experts` for each token; `segment_ids` (B, T) and
        `visibility` (B, T, G), the segments of its chain that each token sees, for the mask; loss `weights` (B, T).
    """

    def batch(of: Callable[[DrawnChain], list[int] | list[float] | Tensor], fill: int) -> Tensor:
        return pad_sequence([torch.cat([torch.as_tensor(of(chain)) for chain in row]) for row in rows], True, fill)

    documents = [[d for d, chain in enumerate(row) for _ in chain.tokens.ids] for row in rows]
    return {
        "input_ids": batch(lambda chain: chain.tokens.ids, pad_id),
        "labels": batch(lambda chain: chain.tokens.labels, IGNORED),
        "position_ids": batch(lambda chain: positions(torch.tensor(chain.tokens.segments), chain.visibility), 0),
        "step_ids": batch(lambda chain: chain.tokens.steps, QUESTION),
        "document_ids": pad_sequence([torch.tensor(row) for row in documents], True, PADDING),
        "segment_ids": batch(lambda chain: chain.tokens.segments, QUESTION),
        "visibility": batch(lambda chain: chain.visibility[chain.tokens.segments], False),
        "weights": batch(lambda chain: chain.tokens.weights, 0),
        "question_experts": batch(lambda chain: [chain.question_expert] * len(chain.tokens.ids), QUESTION),
    }
