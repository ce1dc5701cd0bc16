"""The methods that `train.method` names: MoTE, and what it is compared with (tables 4 and 6 and figure 5 of the paper).

A method is a change of settings, and of what is trained on of a chain. What each is exactly, and what it is not, stands
in docs/decisions/0025. This module knows nothing of models or tokenizers.
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
        note: What it is, in a few words.
        experts: Settings of `experts` that it fixes.
        skips: Whether later steps lose sight of earlier ones in training.
        widen: Its rank, and `lora_alpha` with it, is that of the recipe times this.
        gate: Factors of the gates' losses, by their names in `TokenGatedConfig`; None where no gate is trained.
        apart: Whether each step has a model of its own, trained on that step alone.
        response_only: Whether chains are cut to their answer.
        built: Whether the shorter chains that skipping stands for are rows of their own.
        checks: Whether a fourth step is trained on the verdicts of the chains.
    """

    note: str
    experts: dict[str, Any] = field(default_factory=dict)
    skips: bool = True
    widen: int = 1
    gate: dict[str, Any] | None = None
    apart: bool = False
    response_only: bool = False
    built: bool = False
    checks: bool = False


METHODS: dict[str, Method] = {
    "mote": Method("an expert a step, a shared expert, step skipping"),
    "mote-built": Method("the shorter chains built instead of masked", skips=False, built=True),
    "mote-no-skip": Method("without step skipping", skips=False),
    "mote-no-share": Method("without the shared expert", {"mix": 1.0}),
    "mote-neither": Method("without both", {"mix": 1.0}, skips=False),
    "lora": Method("one LoRA that reads every token", {"mix": 0.0}, skips=False),
    "lora-x2": Method("one LoRA of twice the rank", {"mix": 0.0}, skips=False, widen=2),
    "token-moe": Method("experts that a gate chooses per token", skips=False, gate={"balance": 0.01}),
    "moelora": Method("token-moe with a contrastive loss", skips=False, gate={"balance": 0.01, "contrast": 0.01}),
    "separate": Method("a model for each step", {"mix": 1.0}, skips=False, apart=True),
    "response-only": Method("one LoRA trained on answers alone", {"mix": 0.0}, skips=False, response_only=True),
    "four-experts": Method("MoTE with a fourth expert that judges answers", checks=True),
}


def settled(recipe: Recipe, scheme: Scheme) -> Recipe:
    """A recipe with what its method fixes put in; for the method `mote` it is the recipe itself."""
    method = METHODS[recipe.train.method]
    experts, train = recipe.experts, recipe.train
    experts = experts.model_copy(
        update={"r": experts.r * method.widen, "lora_alpha": experts.lora_alpha * method.widen, **method.experts}
    )
    if not method.skips:
        train = train.model_copy(update={"skip_p": 0.0, "skip_pairs": {}, "skip_views": 1})
    if method.checks:  # a verdict on an answer that is not seen would be a guess
        pairs = {**train.skip_pairs, CHECK: dict.fromkeys(scheme.steps, 0.0)}
        train = train.model_copy(update={"skip_pairs": pairs})
    return recipe.model_copy(update={"experts": experts, "train": train})


def steps_of(recipe: Recipe, scheme: Scheme) -> Chain:
    """The steps that a recipe's method has markers and experts for, in order.

    Raises:
        UserError: `train.steps` names others than the scheme's, or leaves out the answer.
    """
    method, wanted = METHODS[recipe.train.method], recipe.train.steps
    if method.response_only:
        return (scheme.answer,)
    if wanted and (scheme.answer not in wanted or not set(wanted) <= set(scheme.steps)):
        raise UserError(
            f"recipe: train.steps={list(wanted)}: name some of {', '.join(scheme.steps)}, and '{scheme.answer}' among "
            "them"
        )
    steps = tuple(step for step in scheme.steps if step in wanted) if wanted else scheme.steps
    return (*steps, CHECK) if method.checks else steps
