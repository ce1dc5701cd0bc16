"""Chains -> a trained adapter: the stage that `mote train` runs.

Every draw (held-out split, order, step skipping, question expert) depends on the seed, the epoch and the row alone, so
that a run that was interrupted resumes exactly.
"""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import EarlyStoppingCallback

from mote.core.errors import UserError, first_line
from mote.core.files import disk_errors
from mote.core.machine import is_first_process
from mote.core.methods import METHODS, apply_method, steps_of
from mote.core.recipe import Recipe
from mote.core.records import ChainRow
from mote.core.scheme import Chain, Scheme
from mote.models.capabilities import Capabilities, capabilities_of
from mote.models.layers import takes_block_mask
from mote.models.linear import speed_up
from mote.models.load import Base, default_device, fingerprint
from mote.models.memory_estimate import advice, device_memory, training_bytes
from mote.models.rope import original_length
from mote.models.shapes import LLAMA_LIKE, shape_of
from mote.tokens.encode import add_markers
from mote.tokens.masks import MakeMask, mask_form, masks_for, skip_probabilities
from mote.tokens.packing import ChainDataset, collate, unrolled_length
from mote.train.arguments import (
    check_base,
    check_gpu,
    check_row_length,
    pushes_adapter,
    step_weights,
    training_arguments,
    uses_flex_attention,
)
from mote.train.card import GO_ON, Facts, model_card, push, save_adapter
from mote.train.examples import groups_of, split_groups, usable
from mote.train.log import Metrics, held_out_losses, last_whole_checkpoint
from mote.train.trainer import Epochs, MoteTrainer
from mote.tuner import MoteConfig
from mote.tuner.token_gated import TokenGatedConfig


@dataclass(frozen=True)
class _Datasets:
    """Training rows with the draws of each epoch, and held-out rows without step skipping."""

    train: ChainDataset
    held_out: ChainDataset | None

    @property
    def row_length(self) -> int:
        """Tokens of the longest training row."""
        return self.train.row_length or max(len(chain.ids) for chain in self.train.chains)


def train(
    base: Base,
    chains: Sequence[ChainRow],
    scheme: Scheme,
    recipe: Recipe,
    folder: Path,
    capabilities: Capabilities | None = None,
) -> Path:
    """Train the recipe's method on accepted chains and write `adapter/` and `metrics.jsonl` into the folder.

    Resumes from the last complete checkpoint. Each of several processes calls it; the first one writes.

    Args:
        base: Model and tokenizer; the markers are added to the tokenizer, the experts to the model.
        chains: Chains; rejected and unsafe ones are left out (docs/decisions/0005).
        scheme: The scheme the chains were made with.
        recipe: Its `experts` and `train` are used.
        folder: The run folder.
        capabilities: What the base model can do; by default what is known of its architecture.

    Returns:
        The adapter folder.

    Raises:
        UserError: The base model cannot be trained so, there is no chain to train on, or `TrainingArguments` refuses a
            setting.
    """
    check_gpu(str(base.model.device))
    config = mote_config(recipe, scheme)
    recipe = apply_method(recipe, scheme)
    capabilities = capabilities or capabilities_of(base.model.config)
    check_base(recipe, capabilities)
    speed_up(base.model)
    add_markers(base.tokenizer, config, base.model)
    config.base_fingerprint = fingerprint(base.model)
    step_weights_S = step_weights(recipe.train, config.experts, scheme.answer)
    data = _datasets(base.tokenizer, chains, scheme, recipe, config, step_weights_S)
    check_row_length(recipe, capabilities, data.row_length)
    _check_rope(base, recipe, data)
    model = _add_experts(base, config, recipe, data.row_length)
    parameters = model.get_nb_trainable_parameters()  # before FSDP shards them
    trainer = _trainer(base, model, data, config, recipe, step_weights_S, folder, capabilities.takes_masks)
    checkpoint = last_whole_checkpoint(folder / "checkpoints")
    with disk_errors("train", folder, GO_ON):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state_dict = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if is_first_process():
        facts = _facts(trainer, data, chains, config.experts, parameters, folder)
        save_adapter(model, base.tokenizer, scheme, folder / "adapter", model_card(recipe, facts), state_dict)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        if pushes_adapter(recipe):
            _say(f"pushed to {push(folder / 'adapter', trainer.args)}")
    trainer.accelerator.wait_for_everyone()
    return folder / "adapter"


def _datasets(
    tokenizer: Any,
    chains: Sequence[ChainRow],
    scheme: Scheme,
    recipe: Recipe,
    config: MoteConfig,
    step_weights_S: Tensor | None,
) -> _Datasets:
    """Encode the chains, drop those that cannot be trained on, and split off the held-out ones.

    Raises:
        UserError: No chain is left.
    """
    settings = recipe.train
    steps = config.experts
    assert config.routing is not None
    probabilities = skip_probabilities(settings.skip_p, settings.skip_pairs, steps)
    groups, too_long, weightless = usable(
        groups_of(chains, recipe, scheme, steps, tokenizer, config.routing),
        settings.max_length,
        step_weights_S,
        lambda row: unrolled_length(row, probabilities, settings.skip_views),
    )
    if too_long:
        draws = f" in train.skip_views={settings.skip_views} draws" if settings.skip_views > 1 else ""
        _say(f"{too_long} chains are longer{draws} than train.max_length={settings.max_length} and left out")
    if weightless:
        _say(f"{weightless} chains have only steps whose train.step_weights are 0 and are left out")
    if not groups:
        raise UserError(
            f"chains: none of the {len(chains)} chains can be trained on (safe, not rejected, at most "
            f"{settings.max_length} tokens); make more, or lower chains.threshold"
        )
    rows, held_out = split_groups(groups, settings.held_out, recipe.seed, METHODS[settings.method].expanded)
    row_length = settings.max_length if settings.packing else None
    return _Datasets(
        train=ChainDataset(rows, probabilities, recipe.seed, row_length, settings.skip_views),
        held_out=ChainDataset(held_out, torch.zeros_like(probabilities), recipe.seed) if held_out else None,
    )


def _check_rope(base: Base, recipe: Recipe, data: _Datasets) -> None:
    """Refuse chains that the base model would rotate by the length of others in their forward pass.

    Raises:
        UserError: A chain is longer than the length from which the rotary frequencies depend on it.
    """
    original = original_length(base.model.config)
    held_out = data.held_out.chains if data.held_out else ()
    longest = max(len(chain.ids) for chain in (*data.train.chains, *held_out))
    if original is not None and longest > original:
        raise UserError(
            f"recipe: train.max_length={recipe.train.max_length}: {base.name} chooses its rotary frequencies by the "
            f"longest chain of a forward pass, and a chain has {longest} tokens; train.max_length={original} leaves "
            "chains out that are longer than the original frequencies allow"
        )


def _add_experts(base: Base, config: MoteConfig, recipe: Recipe, row_length: int) -> PeftModel:
    """The base model with freshly initialised experts.

    Raises:
        UserError: No module matches `experts.target_modules`.
    """
    torch.manual_seed(recipe.seed)
    try:
        model = get_peft_model(base.model, config)
    except ValueError as error:
        raise UserError(
            f"recipe: experts.target_modules={recipe.experts.target_modules}: {first_line(error)}"
        ) from error
    model.peft_config["default"].base_model_name_or_path = base.name
    trainable, parameters = model.get_nb_trainable_parameters()
    _say(f"{recipe.train.method} trains {trainable:,} parameters, {trainable / parameters:.2%} of the model's")
    _say_memory(base.model, recipe, trainable, len(config.experts), row_length)
    return model


def _trainer(
    base: Base,
    model: PeftModel,
    data: _Datasets,
    config: MoteConfig,
    recipe: Recipe,
    step_weights_S: Tensor | None,
    folder: Path,
    masks: bool,
) -> MoteTrainer:
    arguments = training_arguments(recipe, folder, evaluates=data.held_out is not None, device=base.model.device.type)
    patience = recipe.train.early_stopping_patience
    assert config.routing is not None
    trainer = MoteTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.held_out,
        data_collator=lambda batch: collate(batch, base.tokenizer.pad_token_id),
        callbacks=[Epochs(data.train), *([EarlyStoppingCallback(patience)] if patience else [])],
        markers=config.routing,
        expert_names=config.experts,
        marker_learning_rate=recipe.train.marker_learning_rate,
        make_mask=_mask_builder(base.model, recipe, arguments.torch_compile) if masks else None,
        step_weights=step_weights_S,
        gated=isinstance(config, TokenGatedConfig),
    )
    first_row = {"method": recipe.train.method, "trained_parameters": model.get_nb_trainable_parameters()[0]}
    trainer.add_callback(Metrics(trainer, folder / "metrics.jsonl", first_row))
    return trainer


def _mask_builder(model: Any, recipe: Recipe, compiled: bool) -> MakeMask:
    """What makes the attention masks; switches the model to FlexAttention if the recipe asks for it.

    Raises:
        UserError: The model drops FlexAttention's mask.
    """
    if uses_flex_attention(recipe, model.device.type):
        if not takes_block_mask(model.config):
            raise UserError(
                f"recipe: train.attention=flex_attention: {type(model).__name__} drops its mask, so that tokens would "
                "see later ones; use sdpa"
            )
        model.set_attn_implementation("flex_attention")
    return masks_for(model.config, mask_form(model.config._attn_implementation, compiled))


def _facts(
    trainer: MoteTrainer,
    data: _Datasets,
    chains: Sequence[ChainRow],
    steps: Chain,
    parameters: tuple[int, int],
    folder: Path,
) -> Facts:
    return Facts(
        steps=steps,
        chains=len(chains),
        accepted=sum(chain.accepted for chain in chains),
        rows=len(data.train.chains),
        held_out=len(data.held_out.chains) if data.held_out else 0,
        updates=trainer.state.global_step,
        losses=held_out_losses(folder / "metrics.jsonl", trainer.state.best_global_step),
        trainable=parameters[0],
        parameters=parameters[1],
    )


def mote_config(recipe: Recipe, scheme: Scheme) -> MoteConfig:
    """The adapter's configuration under the recipe's method.

    Args:
        recipe: Without its method's overrides, which must not be applied twice.
        scheme: The scheme of its chains.

    Raises:
        UserError: A value that the method refuses.
    """
    method = METHODS[recipe.train.method]
    steps = steps_of(recipe, scheme)
    given = {**apply_method(recipe, scheme).experts.model_dump(), "experts": steps, "scheme": scheme.name}
    try:
        if method.gate is not None:
            return TokenGatedConfig(**given, **method.gate, gated_experts=len(steps) + 1)
        return MoteConfig(**given, whole_rows=method.separate)
    except ValueError as error:
        raise UserError(f"recipe: experts.{error}") from error


def check_settings(recipe: Recipe, scheme: Scheme, folder: Path) -> None:
    """Check all training settings now instead of after hours of making chains.

    Raises:
        UserError: A value cannot work.
    """
    here = default_device()
    check_gpu(here if recipe.device == "auto" else recipe.device)
    mote_config(recipe, scheme)
    training_arguments(recipe, folder, evaluates=recipe.train.held_out > 0, device=here)
    steps = steps_of(recipe, scheme)
    train_settings = apply_method(recipe, scheme).train
    skip_probabilities(train_settings.skip_p, train_settings.skip_pairs, steps)
    step_weights(train_settings, steps, scheme.answer)
    uses_flex_attention(recipe, here if recipe.device == "auto" else recipe.device.partition(":")[0])


def _say_memory(model: Any, recipe: Recipe, trainable: int, steps: int, length: int) -> None:
    """Print the memory estimate, and the settings to change if it exceeds the device's memory."""
    config = model.config.to_dict()
    if config.get("model_type") not in LLAMA_LIKE:
        return
    dtype = str(model.dtype).removeprefix("torch.")
    estimated = (recipe, shape_of(config), dtype, trainable, steps, length)
    needed = training_bytes(*estimated)
    available = device_memory(str(model.device))
    _say(f"about {needed / 1e9:.1f} GB of {available / 1e9:.1f} GB of {model.device.type} memory will be needed")
    if needed > available:
        _say(f"it may not fit; set {' '.join(advice(*estimated, available))}")


def _say(text: str) -> None:
    if is_first_process():
        print(f"train: {text}", file=sys.stderr)
