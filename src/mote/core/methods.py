"""The training methods that `train.method` names: MoTE and its baselines and ablations.

The paper's tables 4 and 6 and figure 5 compare them. A method overrides settings of the recipe and decides which rows
are made of a chain; docs/decisions/0025 defines each one. This module knows nothing of models or tokenizers.
"""

from dataclasses import dataclass, field
from typing import Any

from mote.core.errors import UserError
from mote.core.recipe import Recipe
from mote.core.scheme import CHECK, Chain, Scheme


@dataclass(frozen=True)
class Method:
    """How a method differs from MoTE.

    Attributes:
        note: Short description, shown on the model card.
        experts: Overrides for the recipe's `experts` section.
        skips: Whether steps are skipped in training (a later step's visibility of earlier ones is dropped).
        widen: Factor on the recipe's rank and `lora_alpha`.
        gate: Weights of the gate losses, named as in `TokenGatedConfig`; None if no gate is trained.
        separate: Whether each step gets its own model, trained on that step alone.
        response_only: Whether chains are cut to their answer.
        expanded: Whether the shorter chains that skipping stands for become separate training rows.
        checks: Whether a fourth step is trained on the self-check verdicts of the chains.
    """

    note: str
    experts: dict[str, Any] = field(default_factory=dict)
    skips: bool = True
    widen: int = 1
    gate: dict[str, Any] | None = None
    separate: bool = False
    response_only: bool = False
    expanded: bool = False
    checks: bool = False


METHODS: dict[str, Method] = {
    "mote": Method("an expert a step, a shared expert, step skipping"),
    "mote-built": Method("the shorter chains built instead of masked", skips=False, expanded=True),
    "mote-no-skip": Method("without step skipping", skips=False),
    "mote-no-share": Method("without the shared expert", {"mix": 1.0}),
    "mote-neither": Method("without both", {"mix": 1.0}, skips=False),
    "lora": Method("one LoRA that reads every token", {"mix": 0.0}, skips=False),
    "lora-x2": Method("one LoRA of twice the rank", {"mix": 0.0}, skips=False, widen=2),
    "token-moe": Method("experts that a gate chooses per token", skips=False, gate={"balance": 0.01}),
    "moelora": Method("token-moe with a contrastive loss", skips=False, gate={"balance": 0.01, "contrast": 0.01}),
    "separate": Method("a model for each step", {"mix": 1.0}, skips=False, separate=True),
    "response-only": Method("one LoRA trained on answers alone", {"mix": 0.0}, skips=False, response_only=True),
    "four-experts": Method("MoTE with a fourth expert that judges answers", checks=True),
}


def apply_method(recipe: Recipe, scheme: Scheme) -> Recipe:
    """The recipe with its method's overrides applied; unchanged for the method `mote`."""
    method = METHODS[recipe.train.method]
    experts = recipe.experts
    train = recipe.train
    widened = {"r": experts.r * method.widen, "lora_alpha": experts.lora_alpha * method.widen}
    experts = experts.model_copy(update=widened | method.experts)
    if not method.skips:
        train = train.model_copy(update={"skip_p": 0.0, "skip_pairs": {}, "skip_views": 1})
    if method.checks:  # the check must always see the answer that it judges
        pairs = {**train.skip_pairs, CHECK: dict.fromkeys(scheme.steps, 0.0)}
        train = train.model_copy(update={"skip_pairs": pairs})
    return recipe.model_copy(update={"experts": experts, "train": train})


def steps_of(recipe: Recipe, scheme: Scheme) -> Chain:
    """The steps that get markers and experts under the recipe's method, in order.

    Raises:
        UserError: `train.steps` names a step that the scheme lacks, or leaves out the answer.
    """
    method = METHODS[recipe.train.method]
    wanted = recipe.train.steps
    if method.response_only:
        return (scheme.answer,)
    if wanted and (scheme.answer not in wanted or not set(wanted) <= set(scheme.steps)):
        raise UserError(
            f"recipe: train.steps={list(wanted)}: name some of {', '.join(scheme.steps)}, and '{scheme.answer}' among "
            "them"
        )
    steps = tuple(step for step in scheme.steps if step in wanted) if wanted else scheme.steps
    return (*steps, CHECK) if method.checks else steps
