"""The variants of `mote bench experts`: one base model with different kinds of LoRA experts.

All variants share the base's frozen weights in memory. Step experts and the variants with the suffix `-fast` use the
base as `mote.load` returns it; the others, and step experts with the suffix `-plain`, as transformers returns it.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from mote.experiments.bench.baselines import GatheredLinear, MaskedLinear, add_split_experts
from mote.models.linear import speed_up
from mote.tuner import MoteConfig
from mote.tuner.token_gated import TokenGatedConfig, gate_loss

BASE = "base"
REFERENCE = "lora-32"  # plain LoRA with the rank of one step expert plus the shared expert
CONTROL = "lora-32-again"
FAST = "-fast"
PLAIN = "mote-4x16-markers-plain"
RANK = 16
STEPS = ("analysis", "guidance", "response")


@dataclass
class Variant:
    """A model to measure.

    Attributes:
        model: The model that is called.
        causal: The transformers model inside it.
        takes_steps: Whether its forward takes `step_ids`.
        starts: Ids of the steps' start markers, if their embeddings are trained.
        extra_loss: Computes a term added to the model's loss.
    """

    model: Any
    causal: Any
    takes_steps: bool = False
    starts: tuple[int, ...] = ()
    extra_loss: Callable[[], Tensor] | None = None

    @property
    def vocab(self) -> int:
        """Number of ids that are no marker."""
        return int(self.causal.config.vocab_size) - 2 * len(self.starts)

    def trained(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def mote_config(**changes: Any) -> MoteConfig:
    """Four experts of rank 16: three steps and the shared one."""
    return MoteConfig(**{"r": RANK, "lora_alpha": 2 * RANK, "experts": STEPS, **changes})


def _base(base: Any) -> Variant:
    base.requires_grad_(False)
    base.enable_input_require_grads()  # so that the backward pass runs through all layers, as in training
    return Variant(base, base)


def _lora(rank: int) -> Callable[[Any], Variant]:
    def build(base: Any) -> Variant:
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        return Variant(get_peft_model(base, config, autocast_adapter_dtype=False), base)

    return build


def _mote(base: Any) -> Variant:
    return Variant(get_peft_model(base, mote_config(), autocast_adapter_dtype=False), base, takes_steps=True)


def _mote_with_markers(base: Any) -> Variant:
    first = base.config.vocab_size
    markers = {name: [first + 2 * i, first + 2 * i + 1] for i, name in enumerate(STEPS)}
    config = mote_config(markers=markers, vocab_size=first + 2 * len(STEPS))
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    return Variant(model, base, takes_steps=True, starts=tuple(start for start, _ in markers.values()))


def _masked(base: Any) -> Variant:
    return Variant(add_split_experts(base, mote_config(), MaskedLinear), base, takes_steps=True)


def _gathered(base: Any) -> Variant:
    return Variant(add_split_experts(base, mote_config(), GatheredLinear), base, takes_steps=True)


def _token_gated(dispatch: Any) -> Callable[[Any], Variant]:
    def build(base: Any) -> Variant:
        config = TokenGatedConfig(r=RANK, lora_alpha=2 * RANK, gated_experts=len(STEPS) + 1, dispatch=dispatch)
        model = get_peft_model(base, config, autocast_adapter_dtype=False)
        return Variant(model, base, extra_loss=lambda: gate_loss(model))

    return build


BUILDERS: dict[str, Callable[[Any], Variant]] = {
    BASE: _base,
    "lora-16": _lora(16),
    REFERENCE: _lora(32),
    CONTROL: _lora(32),
    "lora-64": _lora(64),
    "mote-4x16": _mote,
    "mote-4x16-markers": _mote_with_markers,
    PLAIN: _mote_with_markers,
    "peft-4-masks": _masked,
    "gathered-segments": _gathered,
    "token-gated": _token_gated("gather"),
    "token-gated-dense": _token_gated("dense"),
    BASE + FAST: _base,
    REFERENCE + FAST: _lora(32),
    "token-gated" + FAST: _token_gated("gather"),
}
SPED_UP = ("mote-4x16", "mote-4x16-markers")  # beside those with the suffix -fast
GROWS = ("mote-4x16-markers", PLAIN)  # need a separate, larger embedding
UNCOMPILED = ("token-gated", "token-gated-fast")  # shapes in its graph depend on the data


def build(name: str, base: Any, checkpointing: bool = False) -> Variant:
    """Add a variant to a base model in place; zero weights become random, since some GPUs multiply zeros faster."""
    if name in SPED_UP or name.endswith(FAST):
        speed_up(base)
    torch.manual_seed(0)
    variant = BUILDERS[name](base)
    for parameter in variant.trained():
        if not parameter.any():
            nn.init.normal_(parameter, std=1e-3)
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return variant


def share(base: Any, name: str) -> Any:
    """A copy of the base model that shares its frozen weights."""
    kept = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    if name in GROWS:
        for layer in (base.get_input_embeddings(), base.get_output_embeddings()):
            kept.pop(id(layer.weight), None)
    return copy.deepcopy(base, kept)
