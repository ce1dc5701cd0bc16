"""What is done with a trained model: talking to it, and writing it as files that need no mote."""

from pathlib import Path
from typing import Any

import click

from mote.cli.options import adapter_of, folder_of, mote, options, settings_of
from mote.core.errors import UserError

_FORMAT_HELP = (
    "peft-steps: a plain PEFT LoRA a step; engine-steps: the same beside a base model with the markers' rows; merged: "
    "a transformers model of a one-step mode; vllm: a folder for vLLM."
)


@mote.command()
@options("model", "adapter", "mode", "seed")
@click.option("--show-steps/--answer-only", default=True, help="Show the reasoning steps.")
def chat(
    overrides: tuple[str, ...], adapter: str | None, modes: tuple[str, ...], show_steps: bool, **flags: Any
) -> None:
    """Talk to a trained model and watch its steps. /mode NAME changes the mode, /quit ends."""
    settings, adapter = settings_of(None, overrides, flags), adapter_of(adapter)
    from mote.cli.chat import talk
    from mote.inference.load import load

    model = load(settings.model, adapter, device=settings.device, dtype=settings.dtype, revision=settings.revision)
    talk(model, modes[0] if modes else "adaptive", settings.answer, settings.seed, show_steps)


@mote.command()
@options("adapter", "model", "mode", "out")
@click.option(
    "--format", "form", type=click.Choice(["peft-steps", "engine-steps", "merged", "vllm"]), required=True,
    help=_FORMAT_HELP,
)  # fmt: skip
@click.option("--dtype", help="Of a model; as the base model is stored where none is given.")
def export(
    overrides: tuple[str, ...],
    adapter: str | None,
    out: Path | None,
    modes: tuple[str, ...],
    form: str,
    **flags: Any,
) -> None:
    """Write a trained adapter for other programs: OUT/<step>/ or one model in OUT."""
    settings = settings_of(None, overrides, flags)
    model = settings.model if "model" in settings.model_fields_set else None
    adapter, folder = adapter_of(adapter), folder_of(out, "the folder to make")
    if form == "peft-steps" and (modes or flags["dtype"]):
        raise UserError(f"format: '{form}' writes every step as float32; leave out --mode and --dtype, or use merged")
    if form == "engine-steps" and modes:
        raise UserError(f"format: '{form}' writes every step; leave out --mode, or use merged")
    if len(modes) > 1:
        raise UserError(f"mode: {list(modes)}: a model has one mode of its own; give --mode once")
    from mote.serve.export import export_engine_steps, export_merged, export_steps

    if form == "peft-steps":
        folders = export_steps(adapter, folder, model, settings.revision)
    elif form == "engine-steps":
        folders = export_engine_steps(adapter, folder, model, settings.dtype, settings.revision)
    elif form == "merged":
        mode = modes[0] if modes else "direct"
        folders = [export_merged(adapter, folder, mode, model, settings.dtype, settings.revision)]
    else:
        from mote.serve.vllm.export_folder import export_vllm

        mode, budget = modes[0] if modes else "adaptive", settings.answer.max_step_tokens
        folders = [export_vllm(adapter, folder, mode, model, settings.dtype, settings.revision, budget)]
    for written in folders:
        print(written)
