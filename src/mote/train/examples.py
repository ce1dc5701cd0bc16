"""Chains -> training rows of a method, grouped by chain so that a chain is held out as a whole."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from torch import Tensor

from mote.core.errors import UserError
from mote.core.methods import METHODS, Method
from mote.core.recipe import Recipe
from mote.core.records import ChainRow
from mote.core.scheme import CHECK, Chain, Scheme
from mote.tokens.encode import IGNORED, Tokens, encode_chain, encode_check
from mote.tokens.routing import Markers

Group = list[Tokens]  # training rows of one chain


def groups_of(
    chains: Sequence[ChainRow], recipe: Recipe, scheme: Scheme, steps: Chain, tokenizer: Any, markers: Markers
) -> list[Group]:
    """The training rows of each chain under the recipe's method; chains without rows are dropped.

    Args:
        chains: All chains; those that are not accepted give no reasoning rows (docs/decisions/0005).
        recipe: Names the method.
        scheme: The scheme the chains were made with.
        steps: The steps that the method trains.
        tokenizer: With the markers of these steps.
        markers: Their ids.

    Raises:
        UserError: A chain has a step that the scheme lacks.
    """
    method = METHODS[recipe.train.method]
    groups = []
    for chain in chains:
        group: Group = []
        if chain.accepted:
            group += _chain_rows(chain, method, scheme, steps, tokenizer, markers)
        if method.checks and chain.rejected is None:
            group += _check_rows(chain, scheme, steps, tokenizer, markers)
        if group:
            groups.append(group)
    return groups


def _chain_rows(
    chain: ChainRow, method: Method, scheme: Scheme, steps: Chain, tokenizer: Any, markers: Markers
) -> Group:
    unknown = next((step.name for step in chain.steps if step.name not in scheme.steps), None)
    if unknown:
        raise UserError(f"chains: a chain has a step '{unknown}', the scheme '{scheme.name}' has {list(scheme.steps)}")
    cut = chain.model_copy(update={"steps": tuple(step for step in chain.steps if step.name in steps)})
    forms = shorter(cut) if method.expanded else [cut]
    encoded = [encode_chain(tokenizer, form, replace(markers, whole_rows=False), steps) for form in forms]
    return one_row_per_step(encoded[0]) if method.separate else encoded


def _check_rows(chain: ChainRow, scheme: Scheme, steps: Chain, tokenizer: Any, markers: Markers) -> Group:
    """A row for each answer that was checked, with the verdict as its label."""
    answers = {check.answer: check.safe for check in chain.checks if check.score is not None}
    passes, fails = scheme.verdicts
    return [
        encode_check(
            tokenizer, chain.messages, (scheme.answer, answer), (CHECK, passes if safe else fails), markers, steps
        )
        for answer, safe in answers.items()
    ]


def shorter(chain: ChainRow) -> list[ChainRow]:
    """The chain and every chain that remains when some steps before the answer are removed.

    These are all outcomes of step skipping: a shorter chain without an answer is a prefix of one of them.
    """
    *before, answer = chain.steps
    kept = [some for count in range(len(before), -1, -1) for some in combinations(before, count)]
    return [chain.model_copy(update={"steps": (*some, answer)}) for some in kept]


def one_row_per_step(row: Tokens) -> Group:
    """A row for each step: the text up to its end, read by that step's expert alone, with labels on that step only."""
    group = []
    for step in sorted({step for step, label in zip(row.steps, row.labels, strict=True) if label != IGNORED}):
        end = len(row.steps) - row.steps[::-1].index(step)
        labels = [
            label if own == step else IGNORED for label, own in zip(row.labels[:end], row.steps[:end], strict=True)
        ]
        group.append(Tokens(row.ids[:end], labels, [step] * end))
    return group


def usable(
    groups: Sequence[Group], max_length: int, step_weights_S: Tensor | None, length: Callable[[Tokens], int]
) -> tuple[list[Group], int, int]:
    """Drop groups that are too long, and rows whose steps all have weight 0.

    Args:
        groups: Rows of each chain.
        max_length: Longest row allowed, in tokens.
        step_weights_S: Loss weight of each step.
        length: Tokens of a row in training, all its draws included.

    Returns:
        The kept groups, the number dropped for length, and the number dropped because every step has weight 0.
    """
    fitting = [group for group in groups if all(length(row) <= max_length for row in group)]
    too_long = len(groups) - len(fitting)
    if step_weights_S is None:
        return fitting, too_long, 0
    weighted = [[row for row in group if _has_weight(row, step_weights_S)] for group in fitting]
    kept = [group for group in weighted if group]
    return kept, too_long, len(fitting) - len(kept)


def _has_weight(row: Tokens, step_weights_S: Tensor) -> bool:
    trained = {step for step, label in zip(row.steps, row.labels, strict=True) if label != IGNORED}
    return any(step_weights_S[step] > 0 for step in trained)


def split_groups(groups: Sequence[Group], share: float, seed: int, expanded: bool = False) -> tuple[Group, Group]:
    """Training rows and held-out rows, split by chain with the seed; at least one chain is trained on.

    With `expanded`, only the first row of a held-out chain is kept, the full chain, so that held-out losses are
    comparable with those of other methods.
    """
    order = list(range(len(groups)))
    random.Random(seed).shuffle(order)
    count = min(round(len(groups) * share), len(groups) - 1)
    held = set(order[:count])
    kept = [row for i, group in enumerate(groups) if i not in held for row in group]
    return kept, [row for i in sorted(held) for row in (groups[i][:1] if expanded else groups[i])]
