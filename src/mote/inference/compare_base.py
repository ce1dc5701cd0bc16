"""Tests how an architecture handles our masks, positions and cache: results must equal separately computed sequences.

The comparison runs on a tiny random copy of a base model (`mote.models.tiny_copy`) in float32 and takes about a second.
Chains are longer than the copy's windows and chunks, so that these matter.
Shapes: B row, T token, S step, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mote.core.errors import UserError
from mote.inference.batch_loop import BatchLoop
from mote.inference.batching import Batcher
from mote.inference.grammar import FreeText
from mote.inference.request import Request
from mote.models.capabilities import ABILITIES, Ability, Capabilities, capabilities_of
from mote.models.load import reason, set_attention
from mote.models.tiny_copy import VOCAB, tiny_config, tiny_model
from mote.tokens.encode import IGNORED, Tokens
from mote.tokens.masks import Layout, mask_form, masks_for
from mote.tokens.packing import DrawnChain, collate, repeated_steps, segment_visibility, unroll
from mote.tokens.routing import QUESTION
from mote.tuner.gguf.architectures import refusals

TOLERANCE = 1e-4  # of the largest logit, in float32; a leak between tokens differs by more than 0.1 of it
_STEPS = (9, 8, 7, 8)  # tokens of the question and of three steps
_HALF = torch.full((4, 4), 0.5).tril(-1) * torch.tensor([0.0, 1, 1, 1])  # probability that a step skips an earlier one


_COMPARED: dict[str, Capabilities] = {}  # by configuration: several stages of one run need it


class Copy(NamedTuple):
    """A tiny random copy with the attention that `mote` uses, and one with the same weights and `eager` attention."""

    model: Any
    reference: Any


Comparison = Callable[[Copy], float]  # the largest difference, in units of the largest logit


def checked(config: Any) -> Capabilities:
    """The capabilities of a base model; an unknown architecture is tested first.

    Args:
        config: The base model's configuration.

    Raises:
        UserError: The model's code needs a package that is not installed, or its layers have windows of their own.
    """
    known = capabilities_of(config)
    if known.known:
        return known
    key = config.to_json_string(use_diff=False)
    if key not in _COMPARED:
        _COMPARED[key] = capabilities_of(config, compare(config))
    return _COMPARED[key]


def described(config: Any) -> Capabilities:
    """`checked`, with the llama.cpp formats that the base cannot be written in: for the tables that users see."""
    base = checked(config)
    refused = {form: why for form, why in refusals(config).items() if why is not None}
    return base.model_copy(update={"limits": base.limits | refused})


def compare(config: Any) -> tuple[Ability, ...] | None:
    """The abilities for which a tiny random copy of a base model gives wrong results or fails.

    None if no working copy can be made.
    """
    copy = copy_of(config)
    if copy is None:
        return None
    comparisons: dict[Ability, Comparison] = {
        "training": _training,
        "skipping": _skipping,
        "draws": _draws,
        "packing": _packing,
        "answers": lambda copy: answers_of(copy, Batcher(copy.model, 2)),
    }
    errors = {ability: error_of(comparison, copy) for ability, comparison in comparisons.items()}
    if errors["training"] == float("inf"):
        return None
    return tuple(ability for ability in ABILITIES if not errors[ability] <= TOLERANCE)


def copy_of(config: Any) -> Copy | None:
    """A tiny random copy of a base model, or None if its sizes do not follow from their names.

    Raises:
        UserError: The model's code needs a package that is not installed.
    """
    try:
        small = tiny_config(config)
        model = tiny_model(small)
        set_attention(model, "cpu")
        return Copy(model, tiny_model(small, "eager"))
    except ImportError as error:
        raise UserError(f"model: {config.model_type}: {reason(error)}; or use another base model") from error
    except Exception:  # whatever a model's own code raises
        return None


def error_of(comparison: Comparison, copy: Copy) -> float:
    """The largest difference that a comparison found, in units of the largest logit; infinite if it failed."""
    try:
        with torch.no_grad():
            return comparison(copy)
    except Exception:  # whatever a model's own code raises
        return float("inf")


def _training(copy: Copy) -> float:
    """Rows of plain chains, padded on the right; a token's logits must not depend on later tokens."""
    ids = [_ids(0, 31), _ids(1, 17)]
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
    mask = (torch.arange(padded.shape[1]) < torch.tensor([[len(row)] for row in ids])).long()
    logits = copy.model(input_ids=padded, attention_mask=mask, use_cache=False).logits
    early = _difference(_alone(copy, ids[0])[:9], _alone(copy, ids[0][:9]))
    return max(early, *(_difference(logits[row, : len(own)], _alone(copy, own)) for row, own in enumerate(ids)))


def _skipping(copy: Copy) -> float:
    """A chain whose steps see everything, and one whose last steps do not see the first."""
    whole, skipped = _chain(0), _chain(1)
    logits = _masked(copy, [[_drawn(whole, _seen())], [_drawn(skipped, _seen(False))]])
    question, analysis, *later = torch.split(torch.tensor(skipped.ids), list(_STEPS))
    built = _alone(copy, torch.cat([question, *later]).tolist())
    first = len(question) + len(analysis)
    return max(
        _difference(logits[0], _alone(copy, whole.ids)),
        _difference(logits[1, :first], _alone(copy, skipped.ids[:first])),
        _difference(logits[1, first:], built[len(question) :]),
    )


def _draws(copy: Copy) -> float:
    """A chain with two draws of its last steps in one row: one that sees everything, one that skips the first step."""
    chain = _chain(2)
    logits = _masked(copy, [[_drawn(chain, _seen(), _seen(False))]])[0]
    question, _, *later = torch.split(torch.tensor(chain.ids), list(_STEPS))
    built = _alone(copy, torch.cat([question, *later]).tolist())
    count = len(chain.ids)
    return max(
        _difference(logits[:count], _alone(copy, chain.ids)), _difference(logits[count:], built[len(question) :])
    )


def _packing(copy: Copy) -> float:
    """Two chains in one row."""
    chains = [_chain(3), _chain(4)]
    logits = _masked(copy, [[_drawn(chain, _seen()) for chain in chains]])[0]
    parts = torch.split(logits, [len(chain.ids) for chain in chains])
    return max(_difference(part, _alone(copy, chain.ids)) for part, chain in zip(parts, chains, strict=True))


def answers_of(copy: Copy, loop: BatchLoop) -> float:
    """Greedy answers to prompts of all lengths, two with a shared prefix, against forward passes without a cache."""
    prefix = _ids(5, 8)
    prompts = [_ids(6, 13), prefix + _ids(7, 5), _ids(8, 3), prefix + _ids(9, 9)]
    shared = [0, len(prefix), 0, len(prefix)]
    requests = [Request(ids, FreeText(()), 6, own) for ids, own in zip(prompts, shared, strict=True)]
    futures = [loop.submit(request) for request in requests]
    loop.wait()  # even if a request failed: the model must be idle before the next comparison
    found = [future.result() for future in futures]
    wrong = 0
    for ids, answer in zip(prompts, found, strict=True):
        greedy = _alone(copy, [*ids, *answer])[len(ids) - 1 : -1].argmax(-1)
        wrong += int((greedy != torch.tensor(answer)).sum())
    return float(wrong)


def _ids(seed: int, length: int) -> list[int]:
    ids: list[int] = torch.randint(1, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


def _chain(seed: int) -> Tokens:
    ids = _ids(seed, sum(_STEPS))
    steps = [step for step, length in enumerate(_STEPS, QUESTION) for _ in range(length)]
    return Tokens(ids, [IGNORED] * len(ids), steps)


def _seen(first: bool = True) -> Tensor:
    """Which steps see which (S, S): all of them, or all but the first by those after it."""
    seen = torch.ones(len(_STEPS), len(_STEPS), dtype=torch.bool)
    seen[2:, 1] = first
    return seen


def _drawn(chain: Tokens, *draws: Tensor) -> DrawnChain:
    again = repeated_steps([1, 2, 3], _HALF)
    return DrawnChain(unroll(chain, _HALF, len(draws)), segment_visibility(draws, again), QUESTION)


def _masked(copy: Copy, rows: Sequence[Sequence[DrawnChain]]) -> Tensor:
    """Logits (B, T, V) of rows under the masks and positions of training."""
    batch = collate(rows, 0)
    make = masks_for(copy.model.config, mask_form(copy.model.config._attn_implementation))
    logits: Tensor = copy.model(
        input_ids=batch["input_ids"],
        attention_mask=make(Layout.of(batch)),
        position_ids=batch["position_ids"],
        use_cache=False,
    ).logits
    return logits


def _alone(copy: Copy, ids: Sequence[int]) -> Tensor:
    """Logits (T, V) of one sequence by itself, under transformers' own mask and `eager` attention."""
    logits: Tensor = copy.reference(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits


def _difference(found: Tensor, expected: Tensor) -> float:
    difference = (found - expected).abs().max() / expected.abs().max()
    return float("inf") if difference.isnan() else float(difference)
