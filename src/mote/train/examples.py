"""Chains -> the rows a method trains on, in groups of one chain each, so that a chain is held out as a whole."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from torch import Tensor

from mote.core.errors import UserError
from mote.core.methods import METHODS
from mote.core.recipe import Recipe
from mote.core.records import ChainRow
from mote.core.scheme import CHECK, Chain, Scheme
from mote.tokens.encode import IGNORED, Tokens, encode_chain, encode_check
from mote.tokens.routing import Markers

Group = list[Tokens]  # the rows of one chain


def groups_of(
    chains: Sequence[ChainRow], recipe: Recipe, scheme: Scheme, steps: Chain, tokenizer: Any, markers: Markers
) -> list[Group]:
    """The rows of each chain that has any for the recipe's method.

    Args:
        chains: All chains; those that are not accepted give no steps (docs/decisions/0005).
        recipe: Its method says what rows there are.
        scheme: The scheme the chains were made with.
        steps: The steps that the method has markers for.
        tokenizer: Has these markers.
        markers: Their ids.

    Raises:
        UserError: A chain has a step that is not the scheme's.
    """
    method, groups = METHODS[recipe.train.method], []
    for chain in chains:
        group: Group = []
        if chain.accepted:
            strange = next((step.name for step in chain.steps if step.name not in scheme.steps), None)
            if strange:
                raise UserError(
                    f"chains: a chain has a step '{strange}', the scheme '{scheme.name}' has {list(scheme.steps)}"
                )
            cut = chain.model_copy(update={"steps": tuple(step for step in chain.steps if step.name in steps)})
            encoded = [
                encode_chain(tokenizer, one, replace(markers, whole_rows=False), steps)
                for one in (shorter(cut) if method.expanded else [cut])
            ]
            group += one_row_per_step(encoded[0]) if method.separate else encoded
        if method.checks and chain.rejected is None:
            answers = {check.answer: check.safe for check in chain.checks if check.score is not None}
            passes, fails = scheme.verdicts
            group += [
                encode_check(
                    tokenizer,
                    chain.messages,
                    (scheme.answer, answer),
                    (CHECK, passes if safe else fails),
                    markers,
                    steps,
                )
                for answer, safe in answers.items()
            ]
        if group:
            groups.append(group)
    return groups


def shorter(chain: ChainRow) -> list[ChainRow]:
    """A chain, and every chain that is left where steps before its answer are taken out.

    These are all that skipping stands for: what a shorter chain without an answer would train is the beginning of one
    of them.
    """
    *before, answer = chain.steps
    kept = [some for count in range(len(before), -1, -1) for some in combinations(before, count)]
    return [chain.model_copy(update={"steps": (*some, answer)}) for some in kept]


def one_row_per_step(row: Tokens) -> Group:
    """A row for each step of a chain: the text up to its end, read by this step alone, with a loss on this step."""
    group = []
    for step in sorted({step for step, label in zip(row.steps, row.labels, strict=True) if label != IGNORED}):
        end = len(row.steps) - row.steps[::-1].index(step)
        own = [label if at == step else IGNORED for label, at in zip(row.labels[:end], row.steps, strict=False)]
        group.append(Tokens(row.ids[:end], own, [step] * end))
    return group


def usable(
    groups: Sequence[Group], max_length: int, weights_S: Tensor | None, length: Callable[[Tokens], int]
) -> tuple[list[Group], int, int]:
    """The groups that fit, with the rows that have a weight.

    Args:
        groups: Rows of each chain.
        max_length: Most tokens of a row.
        weights_S: Of the steps' losses.
        length: Tokens of a row as it is trained on.

    Returns:
        Them, how many chains are too long, and how many have only steps that weigh nothing.
    """
    fitting = [group for group in groups if all(length(row) <= max_length for row in group)]
    if weights_S is None:
        return fitting, len(groups) - len(fitting), 0
    weighed = [[row for row in group if _weighs(row, weights_S)] for group in fitting]
    kept = [group for group in weighed if group]
    return kept, len(groups) - len(fitting), len(fitting) - len(kept)


def _weighs(row: Tokens, weights_S: Tensor) -> bool:
    trained = {step for step, label in zip(row.steps, row.labels, strict=True) if label != IGNORED}
    return any(weights_S[step] > 0 for step in trained)


def split_groups(groups: Sequence[Group], share: float, seed: int, expanded: bool = False) -> tuple[Group, Group]:
    """Rows to train on and held-out rows, drawn from the seed; at least one chain to train on.

    Where shorter chains were `expanded`, of a held-out chain only the first row counts, the chain itself: so losses are
    those of the same text as without them.
    """
    order = list(range(len(groups)))
    random.Random(seed).shuffle(order)
    count = min(round(len(groups) * share), len(groups) - 1)
    held = set(order[:count])
    kept = [row for i, group in enumerate(groups) if i not in held for row in group]
    return kept, [row for i in sorted(held) for row in (groups[i][:1] if expanded else groups[i])]
