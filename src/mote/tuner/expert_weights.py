"""Expert weights: how much each expert counts for a token of each step (the equation of section 3.2).

They follow from the step alone; nothing here is learned.
Shapes: B row, T token, S step, E expert, R rank.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mote.tokens.routing import NO_STEP, QUESTION
from mote.tuner.config import MoteConfig

Columns = tuple[tuple[slice, ...], Tensor]  # a step's expert columns of non-zero weight as slices, their weights (2R)
Table = tuple[Tensor, Sequence[Columns]]  # weight of every expert column for every step (1 + S + 1, E*R); its columns
_RUN_COST = 32  # tokens whose expert columns take as long as the calls for one more run


class Run(NamedTuple):
    """Tokens [start, stop) of all rows, one after the other, that are in one step."""

    start: int
    stop: int
    step: int


@dataclass
class Route:
    """What the layers of one adapter and rank read in a forward pass.

    Attributes:
        weights: Weight of every expert column for every token (B, T, E*R), scaling included.
        columns: The columns of non-zero weight for each step from the question on; on a CPU only.
        runs: The runs of tokens with a step, where taking each by itself is faster; on a CPU only.
        idle: Whether it is known that no token has a step.
    """

    weights: Tensor
    columns: Sequence[Columns] = ()
    runs: Sequence[Run] = ()
    idle: bool = False


Routes = dict[tuple[str, int], Route]  # (adapter, rank) -> route


def expert_weight_table(config: MoteConfig, device: torch.device | None = None) -> Tensor:
    """Weight of every expert for a token of every step.

    Returns:
        (1 + S, E): row 0 is the question at inference, row s is step s. Column 0 is the shared expert if there is one,
        and the only column without step experts. Rows sum to 1.
    """
    steps = len(config.experts)
    if config.mix == 0:
        return torch.ones(steps + 1, 1, device=device)
    own = torch.eye(steps, device=device)
    if config.question_expert == "mean":
        question = torch.full((1, steps), 1 / steps, device=device)
    else:
        question = own[[config.experts.index(config.question_expert)]]
    weights = config.mix * torch.cat([question, own])
    if config.shared:
        weights = torch.cat([torch.full((steps + 1, 1), 1 - config.mix, device=device), weights], dim=1)
    return weights


def active_columns(table: Tensor) -> list[Columns]:
    """The expert columns of non-zero weight for each step, and their weights.

    Args:
        table: Weight of every column for every step, from the question on (1 + S, E*R), scaling included.
    """
    found = []
    for row in table:
        active = (row != 0).int()
        edges = active.diff(prepend=active.new_zeros(1), append=active.new_zeros(1)).nonzero().squeeze(1).tolist()
        found.append((tuple(map(slice, edges[::2], edges[1::2])), row[row != 0]))
    return found


class ExpertWeights:
    """Turns step ids into the weights of every expert column, with the tables for it cached."""

    def __init__(self) -> None:
        self._tables: dict[tuple[str, int, torch.device, torch.dtype], Table] = {}

    def __reduce__(self) -> tuple[type["ExpertWeights"], tuple[()]]:
        return ExpertWeights, ()  # a copied or pickled model makes its own tables

    def routes(
        self, adapter: str, config: MoteConfig, ranks: Iterable[int], steps_B_T: Tensor, dtype: torch.dtype
    ) -> Routes:
        """Expert weights of one forward pass, for the adapter's layers of each rank.

        Args:
            adapter: Name of the adapter.
            config: Its configuration.
            ranks: Ranks of its layers.
            steps_B_T: Step of each token.
            dtype: What the layers compute in.
        """
        if config.mix == 0:  # one expert for every step
            steps_B_T = torch.where(steps_B_T == NO_STEP, steps_B_T, 1)
        idle = not torch.compiler.is_compiling() and _is_idle(steps_B_T)
        runs = None
        routes: Routes = {}
        for rank in ranks:
            table, columns = self._table(adapter, config, rank, steps_B_T.device, dtype)
            if runs is None:
                runs = _faster_runs(steps_B_T, columns, table.shape[1]) if columns else ()
            routes[adapter, rank] = Route(table[steps_B_T], columns, runs, idle)
        return routes

    def forget(self, adapter: str) -> None:
        """Drop the tables of a deleted adapter."""
        self._tables = {key: table for key, table in self._tables.items() if key[0] != adapter}

    def _table(self, adapter: str, config: MoteConfig, rank: int, device: torch.device, dtype: torch.dtype) -> Table:
        key = (adapter, rank, device, dtype)
        if torch.compiler.is_compiling() or key not in self._tables:
            weights = expert_weight_table(config, device).mul(config.scaling(rank))
            table = weights.repeat_interleave(rank, dim=1).to(dtype)
            table = torch.cat([table, table.new_zeros(1, table.shape[1])])  # the last row is that of NO_STEP
            if torch.compiler.is_compiling():  # a graph that read the cache would be recompiled when it changes
                return table, ()
            self._tables[key] = table, active_columns(table) if device.type == "cpu" else ()
        return self._tables[key]


def _is_idle(steps_B_T: Tensor) -> bool:
    """Whether no token has a step; only read on a CPU, since another device would have to be waited for."""
    return steps_B_T.device.type == "cpu" and bool((steps_B_T == NO_STEP).all())


def _faster_runs(steps_B_T: Tensor, columns: Sequence[Columns], width: int) -> Sequence[Run]:
    """The runs of tokens with a step; none where multiplying all columns for all tokens is faster.

    Args:
        steps_B_T: Step of each token.
        columns: The columns of each step.
        width: Number of all columns, E*R.
    """
    steps_N = steps_B_T.flatten()
    if len(steps_N) <= 2 * _RUN_COST:
        return ()
    starts = [0, *(steps_N.diff().nonzero().squeeze(1) + 1).tolist()]
    runs = [
        Run(start, stop, step)
        for start, stop, step in zip(starts, [*starts[1:], len(steps_N)], steps_N[starts].tolist(), strict=True)
        if step >= QUESTION
    ]
    cost = sum((run.stop - run.start + _RUN_COST) * len(columns[run.step][1]) for run in runs)
    return runs if cost < len(steps_N) * width else ()
