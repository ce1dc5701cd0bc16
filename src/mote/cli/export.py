"""`mote export`."""

import sys
from pathlib import Path
from typing import Any

import click

from mote.cli.options import adapter_of, folder_of, mote, options, settings_of
from mote.core.errors import UserError

_FORMAT_HELP = (
    "peft-steps: a plain PEFT LoRA per step; engine-steps: the same plus a base model with the marker rows; merged: a "
    "transformers model for a one-step mode; vllm: a folder for vLLM; gguf: one file with all steps for llama.cpp; "
    "gguf-steps: the base model and a LoRA per step for llama.cpp."
)
_FORMATS = ("peft-steps", "engine-steps", "merged", "vllm", "gguf", "gguf-steps")
_TYPES = ("q8_0", "f16", "f32")


@mote.command()
@options("adapter", "model", "mode", "out")
@click.option(
    "--format",
    "form",
    type=click.Choice(_FORMATS),
    required=True,
    help=_FORMAT_HELP,
)
@click.option("--dtype", help="Dtype of an exported model; by default that of the stored base model.")
@click.option("--quantise", type=click.Choice(_TYPES), help="Type of a GGUF file's base weights; by default q8_0.")
@click.option("--experts", type=click.Choice(_TYPES), help="Type of a GGUF file's experts; by default f16.")
def export(
    overrides: tuple[str, ...],
    adapter: str | None,
    out: Path | None,
    modes: tuple[str, ...],
    form: str,
    quantise: Any,
    experts: Any,
    **flags: Any,
) -> None:
    """Export a trained adapter for other programs: OUT/<step>/ or one model in OUT."""
    settings = settings_of(None, overrides, flags)
    model = settings.model if "model" in settings.model_fields_set else None
    adapter = adapter_of(adapter)
    folder = folder_of(out, "the folder to create")
    if form == "peft-steps" and (modes or flags["dtype"]):
        raise UserError(f"format: '{form}' writes every step as float32; leave out --mode and --dtype, or use merged")
    if form == "engine-steps" and modes:
        raise UserError(f"format: '{form}' writes every step; leave out --mode, or use merged")
    if form in ("gguf", "gguf-steps"):
        if modes or flags["dtype"]:
            raise UserError(f"format: '{form}' writes every mode; leave out --mode, and give --quantise for --dtype")
        from mote.serve.gguf_export import export_gguf, export_gguf_steps

        write = export_gguf if form == "gguf" else export_gguf_steps
        print(write(adapter, folder, model, quantise or "q8_0", experts, settings.revision))
        run = f"llama-server -m {folder}/model.gguf -c 4096 --jinja"
        if form == "gguf-steps":
            run = f"mote answer --adapter {adapter} --engine llamacpp --questions FILE --out FOLDER"
        print(f"mote: run it with: {run}", file=sys.stderr)
        return
    if quantise or experts:
        raise UserError(f"format: '{form}' is no GGUF file; leave out --quantise and --experts, or use --dtype")
    if len(modes) > 1:
        raise UserError(f"mode: {list(modes)}: an exported model has one default mode; give --mode once")
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

        mode = modes[0] if modes else "adaptive"
        budget = settings.answer.max_step_tokens
        folders = [export_vllm(adapter, folder, mode, model, settings.dtype, settings.revision, budget)]
    for written in folders:
        print(written)
