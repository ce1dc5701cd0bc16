"""Settings under `train` -> `TrainingArguments`; values that cannot work are refused before anything starts."""

import difflib
import math
import os
import sys
from pathlib import Path
from typing import Any, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from mote.core.errors import UserError, first_line
from mote.core.recipe import Recipe, TrainSettings
from mote.models.capabilities import Ability, Capabilities

# TrainingArguments that a run sets itself.
_FIXED = {
    "output_dir": "checkpoints live in the run folder, give that with --out",
    "seed": "it is the recipe's own seed",
    "data_seed": "it is the recipe's own seed",
    "remove_unused_columns": "masks and steps are not columns that transformers knows",
}


def training_arguments(recipe: Recipe, folder: Path, evaluates: bool = True, device: str = "cpu") -> TrainingArguments:
    """Our defaults, overridden by anything under `train:`.

    `push_to_hub` is always off: the trainer would push its checkpoints, `mote.train.stage` pushes the adapter instead.

    Args:
        recipe: Its `train` and `seed` are used.
        folder: The run folder.
        evaluates: Whether there are held-out chains.
        device: Device type.

    Raises:
        UserError: A key or a value that `TrainingArguments` does not take, or a tracker that is not installed.
    """
    known = get_type_hints(TrainingArguments)
    ours = {*TrainSettings.model_fields} - {*known}
    given = {key: value for key, value in recipe.train.model_dump().items() if key not in ours}
    for key, remedy in _FIXED.items():
        if key in given:
            raise UserError(f"recipe: train.{key} cannot be set: {remedy}")
    defaults = _defaults(recipe, folder, evaluates, device)
    if recipe.train.early_stopping_patience is not None or given.get("load_best_model_at_end"):
        _keep_best(recipe, evaluates, defaults, given)
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(key, [*known, *ours], n=1)
            hint = f"; did you mean 'train.{near[0]}'?" if near else ": neither ours nor one of TrainingArguments"
            raise UserError(f"recipe: unknown setting 'train.{key}'{hint}")
        try:
            given[key] = TypeAdapter(known[key]).validate_python(value)
        except ValidationError as error:
            raise UserError(f"recipe: train.{key}={value!r}: {first_line(error)}") from error
    arguments = defaults | given
    if 0 < (arguments["save_total_limit"] or 2) < 2:
        raise UserError("recipe: train.save_total_limit=1: use 2 or more; one is kept while the next is written")
    try:
        found = TrainingArguments(**arguments | {"push_to_hub": False})
    except (ValueError, TypeError) as error:
        raise UserError(f"recipe: train: {str(error).splitlines()[0]}") from error
    _check_trackers(found.report_to)
    if pushes_adapter(recipe) and not found.hub_model_id:
        raise UserError("recipe: train.push_to_hub=true: give the repository too, train.hub_model_id=user/name")
    return found


def pushes_adapter(recipe: Recipe) -> bool:
    """Whether the trained adapter is pushed to the Hub."""
    return TypeAdapter(bool).validate_python((recipe.train.model_extra or {}).get("push_to_hub") or False)


def _defaults(recipe: Recipe, folder: Path, evaluates: bool, device: str) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "checkpoints"),
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "save_total_limit": 2,
        "eval_strategy": "epoch" if evaluates else "no",
        "report_to": "none",
        "run_name": recipe.name,
        "project": "mote",
        "remove_unused_columns": False,
        "disable_tqdm": not sys.stderr.isatty(),
        "dataloader_pin_memory": device == "cuda",
        "use_cpu": device == "cpu",
        "ddp_find_unused_parameters": False,  # an expert without tokens in a batch gets a gradient of zero
    }


def _keep_best(recipe: Recipe, evaluates: bool, defaults: dict[str, Any], given: dict[str, Any]) -> None:
    """Train to the checkpoint of the lowest held-out loss; one is saved at each evaluation."""
    if not evaluates:
        raise UserError(
            f"recipe: train.held_out={recipe.train.held_out}: the best checkpoint is that of the lowest held-out "
            "loss; hold some chains out"
        )
    defaults |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    given.setdefault("save_strategy", given.get("eval_strategy", "epoch"))
    if given["save_strategy"] == "steps":
        given["save_steps"] = given.get("eval_steps", given["save_steps"])


def _check_trackers(names: Any) -> None:
    installed = get_available_reporting_integrations()
    for name in names or ():
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(f"recipe: train.report_to={name}: use none, tensorboard, trackio or wandb")
        if name not in installed:
            raise UserError(f"recipe: train.report_to={name}: it is not installed; `pip install {name}`, or use none")


def step_weights(settings: TrainSettings, steps: tuple[str, ...], answer: str = "response") -> Tensor | None:
    """Loss weight of each step (S), 0 for the question; None if every token counts the same.

    Args:
        settings: `loss`, `step_weights` and `skip_views` are used.
        steps: The trained steps, in order.
        answer: The step that the user reads.

    Raises:
        UserError: A name that is not a step, a weight below 0, no weight above 0, or label smoothing with weights.
    """
    weights = dict(settings.step_weights)
    if settings.loss == "response":
        if weights:
            raise UserError("recipe: train.loss=response does not go with train.step_weights; remove one")
        weights = {step: float(step == answer) for step in steps}
    for step, weight in weights.items():
        setting = f"recipe: train.step_weights.{step}={weight}"
        if step not in steps:
            raise UserError(f"{setting}: name one of {', '.join(steps)}")
        if not 0 <= weight < math.inf:
            raise UserError(f"{setting}: a weight is 0 or above")
    given = [weights.get(step, 1.0) for step in steps]
    if not any(given):
        raise UserError(f"recipe: train.step_weights={settings.step_weights}: leave one step a weight above 0")
    if set(given) == {1.0} and settings.skip_views == 1:
        return None
    if smoothing := (settings.model_extra or {}).get("label_smoothing_factor"):
        other = "step_weights" if settings.skip_views == 1 else f"skip_views={settings.skip_views}"
        raise UserError(f"recipe: train.label_smoothing_factor={smoothing}: does not go with train.{other}; remove one")
    return torch.tensor([0.0, *given])


def check_gpu(device: str) -> None:
    """Refuse a selection of GPUs that transformers' `Trainer` would ignore.

    One process trains on the first GPU that it sees, and by `nn.DataParallel` on all of them if it sees more.

    Raises:
        UserError: Another GPU is named, or several are seen without a launcher.
    """
    if not device.startswith("cuda") or not torch.cuda.is_available() or "LOCAL_RANK" in os.environ:
        return
    index = torch.device(device).index or 0
    count = torch.cuda.device_count()
    if index or count > 1:
        raise UserError(
            f"device: '{device}' is one of {count} GPUs, and training in a single process uses all that it sees; set "
            f"CUDA_VISIBLE_DEVICES={index} and device=cuda, or start a process per GPU with `accelerate launch`"
        )


def check_base(recipe: Recipe, base: Capabilities) -> None:
    """Check that the base model can be trained with these settings.

    Args:
        recipe: The recipe, with its method applied.
        base: What the base model can do.

    Raises:
        UserError: It cannot; the message names the setting and the remedy.
    """
    settings = recipe.train
    skips = settings.skip_p > 0 or any(
        p > 0 for of_earlier in settings.skip_pairs.values() for p in of_earlier.values()
    )
    skipping = f"train.skip_p={settings.skip_p}" if settings.skip_p else f"train.skip_pairs={settings.skip_pairs}"
    asked: dict[Ability, tuple[str, bool]] = {
        "training": (f"model={recipe.model}", True),
        "skipping": (skipping, skips),
        "draws": (f"train.skip_views={settings.skip_views}", skips and settings.skip_views > 1),
        "packing": ("train.packing=true", settings.packing),
    }
    for ability, (setting, used) in asked.items():
        if used and (limit := base.limits.get(ability)):
            raise UserError(f"recipe: {setting}: {limit}")
    if settings.packing:
        check_row_length(recipe, base, settings.max_length)
    if settings.attention == "flex_attention" and not base.takes_masks:
        raise UserError(f"recipe: train.attention=flex_attention: {recipe.model} is trained without masks; use sdpa")


def check_row_length(recipe: Recipe, base: Capabilities, row_length: int) -> None:
    """Check that no row is so long that the base model's attention depends on what else is in it.

    Args:
        recipe: The recipe, with its method applied.
        base: What the base model can do.
        row_length: Tokens of the longest training row.

    Raises:
        UserError: The rows are too long to be packed or to have skipped steps.
    """
    settings = recipe.train
    moved = settings.packing or settings.skip_p > 0 or bool(settings.skip_pairs)
    if moved and base.longest is not None and row_length > base.longest and base.takes_masks:
        raise UserError(
            f"recipe: train.max_length={settings.max_length}: in a row of more than {base.longest} tokens the "
            f"attention of {recipe.model} depends on what else is in the row, which packing and skipping change; use "
            f"at most {base.longest}, or train.packing=false train.skip_p=0"
        )


def uses_flex_attention(recipe: Recipe, device: str) -> bool:
    """Whether training uses FlexAttention.

    Raises:
        UserError: It is asked for on a device where PyTorch has no backward pass for it.
    """
    if recipe.train.attention == "flex_attention" and device != "cuda":
        raise UserError(
            f"recipe: train.attention=flex_attention: PyTorch trains with it on CUDA only, not on {device}; use sdpa"
        )
    return recipe.train.attention == "flex_attention"
