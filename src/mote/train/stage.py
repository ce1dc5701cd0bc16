"""Chains -> a trained adapter: the stage that `mote train` runs.

Every draw (held-out split, order, step skipping, the question's expert) depends on the seed, the epoch and the row
alone, so that a run that was cut goes on exactly as it would have.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import EarlyStoppingCallback, PrinterCallback
from transformers.integrations.integration_utils import TensorBoardCallback

from mote.core.errors import UserError, first_line
from mote.core.files import disk_errors
from mote.core.machine import is_first_process
from mote.core.methods import METHODS, apply_method, steps_of
from mote.core.recipe import Recipe
from mote.core.records import ChainRow
from mote.core.scheme import Scheme
from mote.models.attention import GROUPED_SDPA
from mote.models.linear import speed_up
from mote.models.load import Base, default_device, fingerprint
from mote.models.memory_estimate import advice, device_memory, training_bytes
from mote.models.shapes import LLAMA_LIKE, shape_of
from mote.tokens.encode import add_markers
from mote.tokens.masks import block_mask, document_mask, skip_probabilities
from mote.tokens.packing import ChainDataset, collate, unroll
from mote.train.arguments import step_weights, training_arguments, uses_flex_attention
from mote.train.card import GO_ON, Facts, model_card, push, save_adapter
from mote.train.examples import groups_of, split_groups, usable
from mote.train.log import Metrics, held_out_losses, last_whole_checkpoint
from mote.train.trainer import Epochs, MoteTrainer
from mote.tuner import MoteConfig
from mote.tuner.token_gated import TokenGatedConfig


def train(base: Base, chains: Sequence[ChainRow], scheme: Scheme, recipe: Recipe, folder: Path) -> Path:
    """Train the recipe's method on accepted chains and write `adapter/` and `metrics.jsonl` into the folder.

    Goes on from the last whole checkpoint where there is one. Of several processes, each calls it; the first writes.

    Args:
        base: Model and tokenizer; the tokenizer gets the markers, the model the experts.
        chains: Chains; rejected and unsafe ones are left out (docs/decisions/0005).
        scheme: The scheme the chains were made with.
        recipe: Settings; `experts` and `train` are used.
        folder: The run folder.

    Returns:
        The adapter's folder.

    Raises:
        UserError: No chain to train on, or a setting that `TrainingArguments` refuses.
    """
    config, steps = mote_config(recipe, scheme), steps_of(recipe, scheme)
    recipe = apply_method(recipe, scheme)
    settings = recipe.train
    speed_up(base.model)
    add_markers(base.tokenizer, config, base.model)
    config.base_fingerprint = fingerprint(base.model)
    markers = config.routing
    assert markers is not None
    chances = skip_probabilities(settings.skip_p, settings.skip_pairs, steps)
    weights = step_weights(settings, steps, scheme.answer)
    flex = uses_flex_attention(recipe, base.model.device.type)
    every = groups_of(chains, recipe, scheme, steps, base.tokenizer, markers)
    groups, too_long, weightless = usable(
        every, settings.max_length, weights, lambda row: len(unroll(row, chances, settings.skip_views).ids)
    )
    if too_long:
        views = f" in train.skip_views={settings.skip_views} views" if settings.skip_views > 1 else ""
        _say(f"{too_long} chains are longer{views} than train.max_length={settings.max_length} and left out")
    if weightless:
        _say(f"{weightless} chains have only steps whose train.step_weights are 0 and are left out")
    if not groups:
        raise UserError(
            f"chains: none of the {len(chains)} chains can be trained on (safe, not rejected, at most "
            f"{settings.max_length} tokens); make more, or lower chains.threshold"
        )
    train_rows, held_out = split_groups(groups, settings.held_out, recipe.seed, METHODS[settings.method].expanded)
    torch.manual_seed(recipe.seed)
    try:
        model = get_peft_model(base.model, config)
    except ValueError as error:
        raise UserError(
            f"recipe: experts.target_modules={recipe.experts.target_modules}: {first_line(error)}"
        ) from error
    model.peft_config["default"].base_model_name_or_path = base.name
    trainable, parameters = model.get_nb_trainable_parameters()
    _say(f"{settings.method} trains {trainable:,} parameters, {trainable / parameters:.2%} of the model's")
    room = settings.max_length if settings.packing else None
    data = ChainDataset(train_rows, chances, recipe.seed, room, settings.skip_views)
    _say_memory(base.model, recipe, trainable, len(steps), room or max(len(row.ids) for row in data.chains))
    arguments = training_arguments(recipe, folder, evaluates=bool(held_out), device=base.model.device.type)
    arguments.push_to_hub, pushes = (
        False,
        arguments.push_to_hub,
    )  # the trainer would push its checkpoints, we the adapter
    metrics = Metrics(folder / "metrics.jsonl", {"method": settings.method, "trained_parameters": trainable})
    patience = settings.early_stopping_patience
    trainer = MoteTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=ChainDataset(held_out, torch.zeros_like(chances), recipe.seed) if held_out else None,
        data_collator=lambda batch: collate(batch, base.tokenizer.pad_token_id),
        callbacks=[metrics, Epochs(data), *([EarlyStoppingCallback(patience)] if patience else [])],
    )
    trainer.remove_callback(PrinterCallback)  # our callback writes the lines
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder / "tensorboard")  # its own place is removed with the checkpoints
    trainer.markers, trainer.expert_names, metrics.trainer = markers, config.experts, trainer
    trainer.marker_learning_rate = settings.marker_learning_rate
    trainer.gated = isinstance(config, TokenGatedConfig)
    if weights is not None:
        trainer.step_weights, trainer.loss_is_scaled_for_ga = weights, True
    if flex:
        trainer.make_mask = block_mask
        base.model.set_attn_implementation("flex_attention")
    elif base.model.config._attn_implementation == GROUPED_SDPA and not arguments.torch_compile:
        trainer.make_mask = document_mask
    checkpoint = last_whole_checkpoint(Path(arguments.output_dir))
    with disk_errors("train", folder, GO_ON):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if is_first_process():
        facts = Facts(
            steps=steps,
            chains=len(chains),
            accepted=sum(chain.accepted for chain in chains),
            rows=len(train_rows),
            held_out=len(held_out),
            updates=trainer.state.global_step,
            losses=held_out_losses(metrics.path, trainer.state.best_global_step),
            trainable=trainable,
            parameters=parameters,
        )
        save_adapter(model, base.tokenizer, scheme, folder / "adapter", model_card(recipe, facts), state)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        if pushes:
            _say(f"pushed to {push(folder / 'adapter', arguments)}")
    trainer.accelerator.wait_for_everyone()
    return folder / "adapter"


def mote_config(recipe: Recipe, scheme: Scheme) -> MoteConfig:
    """The adapter's configuration as a recipe, before `apply_method`, and its method have it.

    Raises:
        UserError: A value that the method refuses.
    """
    method, steps = METHODS[recipe.train.method], steps_of(recipe, scheme)
    given = {**apply_method(recipe, scheme).experts.model_dump(), "experts": steps, "scheme": scheme.name}
    try:
        if method.gate is not None:
            return TokenGatedConfig(**given, **method.gate, gated_experts=len(steps) + 1)
        return MoteConfig(**given, whole_rows=method.separate)
    except ValueError as error:
        raise UserError(f"recipe: experts.{error}") from error


def check_settings(recipe: Recipe, scheme: Scheme, folder: Path) -> None:
    """Let everything that looks at the settings of training look at them now, not after hours of making chains.

    Raises:
        UserError: A value that is refused.
    """
    here = default_device()
    mote_config(recipe, scheme)
    training_arguments(recipe, folder, evaluates=recipe.train.held_out > 0, device=here)
    steps, train_settings = steps_of(recipe, scheme), apply_method(recipe, scheme).train
    skip_probabilities(train_settings.skip_p, train_settings.skip_pairs, steps)
    step_weights(train_settings, steps, scheme.answer)
    uses_flex_attention(recipe, here if recipe.device == "auto" else recipe.device.partition(":")[0])


def _say_memory(model: Any, recipe: Recipe, trainable: int, steps: int, length: int) -> None:
    """Say what training will need, and what to turn where that is more than there is."""
    config = model.config.to_dict()
    if config.get("model_type") not in LLAMA_LIKE:
        return
    dtype = str(model.dtype).removeprefix("torch.")
    needs, there = (recipe, shape_of(config), dtype, trainable, steps, length), device_memory(str(model.device))
    needed = training_bytes(*needs)
    _say(f"about {needed / 1e9:.1f} GB of {there / 1e9:.1f} GB of {model.device.type} memory will be needed")
    if needed > there:
        _say(f"it may not fit; turn {' '.join(advice(*needs, there))}")


def _say(text: str) -> None:
    if is_first_process():
        print(f"train: {text}", file=sys.stderr)
