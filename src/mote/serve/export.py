"""Exports a trained adapter to formats that do not need `mote`: a plain LoRA per step, or a merged model of one step.

The experts of a step's tokens, its own and the shared one, are a single LoRA of twice the rank (docs/decisions/0014).
The export applies them to every token, those of the question included.
Shapes: D model (in, out), E expert, R rank.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import load_peft_weights
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from mote.core.errors import UserError
from mote.core.files import atomic_folder, check_new, disk_errors
from mote.core.scheme import BASE, Scheme, start_marker
from mote.inference.load import Adapter, load, read_adapter
from mote.models.load import load_config, model_folder
from mote.tokens.encode import special_ids, stop_ids
from mote.tuner import MoteConfig
from mote.tuner.expert_weights import active_columns, expert_weight_table
from mote.tuner.step_runs import fold
from mote.tuner.token_gated import TokenGatedConfig

PREFIX = "base_model.model."  # PEFT's prefix of the base model's module names
_AGAIN = "run the same command again"


def export_steps(adapter: str, out: Path, model: str | None = None, revision: str | None = None) -> list[Path]:
    """Write a plain LoRA for each step expert to OUT/<step>/, from the adapter alone.

    Args:
        adapter: Folder of a trained adapter, or a hub id.
        out: Folder to create.
        model: Base model named in the LoRAs; by default the adapter's. Its weights are not read.
        revision: Hub revision of the base model.

    Returns:
        The folders, in the order of the steps.

    Raises:
        UserError: `adapter` has no step experts or no tokenizer, the base model does not exist, or `out` exists.
        MoteError: The files cannot be written.
    """
    check_new(out)
    trained = read_adapter(adapter)
    check_exportable(trained)
    config = trained.config
    base = model_folder(base_name(trained, model))
    tokenizer = trained.tokenizer
    tensors = load_peft_weights(adapter, device="cpu")
    rows = {name: tensor for name, tensor in tensors.items() if ".mote_" not in name}
    with disk_errors("export", out, _AGAIN), atomic_folder(out) as scratch:
        for step in config.experts:
            _save_step(scratch / step, config, tensors, step, base, revision, rows)
            tokenizer.save_pretrained(scratch / step)
            card = _STEP_CARD.format(base=base, step=step, marker=start_marker(step))
            (scratch / step / "README.md").write_text(card, encoding="utf-8")
    return [out / step for step in config.experts]


def export_engine_steps(
    adapter: str, out: Path, model: str | None = None, dtype: str = "auto", revision: str | None = None
) -> list[Path]:
    """Write the base model with the marker rows to OUT/base/, and a LoRA without them for each step to OUT/<step>/.

    For engines that load LoRAs but no embedding rows, such as vLLM without a plugin.

    Args:
        adapter: Folder of a trained adapter, or a hub id.
        out: Folder to create.
        model: Base model; by default the one that the adapter names.
        dtype: Of the base model: `auto` (as stored), `float32`, `bfloat16` or `float16`.
        revision: Hub revision of the base model.

    Returns:
        The folders, the base model's first.

    Raises:
        UserError: The base model is quantised or not the adapter's, or as in `export_steps`.
        MoteError: The files cannot be written.
    """
    check_new(out)
    trained = read_adapter(adapter)
    check_exportable(trained)
    config = trained.config
    name = base_name(trained, model)
    loaded = load(name, trained, device="cpu", dtype=plain_dtype(name, revision, dtype), revision=revision)
    tensors = load_peft_weights(adapter, device="cpu")
    plain = merge_step(loaded.model, {})
    with disk_errors("export", out, _AGAIN), atomic_folder(out) as scratch:
        plain.save_pretrained(scratch / "base")
        loaded.tokenizer.save_pretrained(scratch / "base")
        for step in config.experts:
            _save_step(scratch / step, config, tensors, step, str(out / "base"), None, {})
    return [out / part for part in ("base", *config.experts)]


def _save_step(
    folder: Path,
    config: MoteConfig,
    tensors: Mapping[str, Tensor],
    step: str,
    base: str,
    revision: str | None,
    rows: dict[str, Tensor],
) -> None:
    """Write a step's LoRA and the given embedding rows."""
    layers = step_lora(config, tensors, step)
    lora_config(config, layers, base, revision, bool(rows)).save_pretrained(folder)
    state = {f"{PREFIX}{name}.lora_A.weight": first for name, (first, _) in layers.items()}
    state |= {f"{PREFIX}{name}.lora_B.weight": second for name, (_, second) in layers.items()}
    save_file(state | rows, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def step_lora(config: MoteConfig, tensors: Mapping[str, Tensor], step: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The experts of one step as a plain LoRA, with expert weights and scaling folded into `lora_B`.

    Args:
        config: The adapter's configuration.
        tensors: The adapter's tensors, by name.
        step: Name of the step.

    Returns:
        Module name in the base model -> A (2R, in) and B (out, 2R) in float32; R without a shared expert.
    """
    weights_E = expert_weight_table(config)[1 + config.experts.index(step)]
    layers = {}
    for name, first in tensors.items():
        module, found, _ = name.removeprefix(PREFIX).partition(".mote_A.")
        if found:
            rank = len(first) // config.total_experts
            weights = weights_E.mul(config.scaling(rank)).repeat_interleave(rank)
            second = tensors[name.replace(".mote_A.", ".mote_B.")]
            a, b = fold(first, second, active_columns(weights[None])[0], torch.float32)
            layers[module] = a, b.contiguous()
    return layers


def lora_config(
    config: MoteConfig, layers: Mapping[str, tuple[Tensor, Tensor]], base: str, revision: str | None, rows: bool = True
) -> LoraConfig:
    """The configuration of a step's LoRA: layers by name, with `lora_alpha` chosen so that each is scaled by 1.

    Args:
        config: The adapter's configuration.
        layers: As from `step_lora`.
        base: The base model's name.
        revision: Its hub revision.
        rows: Whether the marker rows of the embedding are included.
    """
    ranks = {name: len(first) for name, (first, _) in layers.items()}
    usual = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    return LoraConfig(
        r=usual,
        lora_alpha=usual,
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=sorted(layers),
        trainable_token_indices=config.trainable_token_indices if rows else None,
        base_model_name_or_path=base,
        revision=revision or config.revision,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )


def export_merged(
    adapter: str,
    out: Path,
    mode: str = "direct",
    model: str | None = None,
    dtype: str = "auto",
    revision: str | None = None,
) -> Path:
    """Write a plain transformers model that answers in a mode of one step.

    Its logits equal the adapter's with that step's experts on all tokens, as with `question_expert` set to the step.

    Args:
        adapter: Folder of a trained adapter, or a hub id.
        out: Folder to create.
        mode: A mode of one step.
        model: Base model; by default the one that the adapter names.
        dtype: `auto` (as the base model is stored), `float32`, `bfloat16` or `float16`. Merging is done in float32.
        revision: Hub revision of the base model.

    Returns:
        The folder.

    Raises:
        UserError: The mode has more than one step, the base model is quantised or not the adapter's, or as in
            `export_steps`.
        MoteError: The files cannot be written.
    """
    check_new(out)
    trained = read_adapter(adapter)
    check_exportable(trained)
    config = trained.config
    step = only_step(trained.scheme, mode)
    base = base_name(trained, model)
    dtype = plain_dtype(base, revision, dtype)
    loaded = load(base, trained, device="cpu", dtype=dtype, revision=revision)
    layers = step_lora(config, load_peft_weights(adapter, device="cpu"), step)
    plain = merge_step(loaded.model, layers)
    tokenizer = loaded.tokenizer
    ends = [config.markers[step][1], *stop_ids(tokenizer, loaded.base.model)]
    plain.config.eos_token_id = plain.generation_config.eos_token_id = ends
    # As in the grammar of `mote answer`, no step contains a special token.
    plain.generation_config.suppress_tokens = sorted(special_ids(tokenizer) - set(ends))
    tokenizer.chat_template = opening_template(tokenizer.get_chat_template(), start_marker(step))
    with disk_errors("export", out, _AGAIN), atomic_folder(out) as scratch:
        plain.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        card = _MERGED_CARD.format(base=base, mode=mode, step=step, marker=start_marker(step))
        (scratch / "README.md").write_text(card, encoding="utf-8")
    return out


def only_step(scheme: Scheme, mode: str) -> str:
    """The one step of a mode.

    Raises:
        UserError: There is no such mode, or it has several steps or none.
    """
    chains = () if mode == BASE else scheme.chains_of(mode)
    if len(chains) == 1 and len(chains[0]) == 1:
        return chains[0][0]
    possible = [name for name, chain in scheme.depths.items() if len(chain) == 1]
    raise UserError(
        f"mode: '{mode}' cannot be merged: a merged model applies one step's experts to all tokens; use one of "
        f"{possible}, or --format peft-steps for each step by itself"
    )


@torch.no_grad()
def merge_step(model: Any, layers: Mapping[str, tuple[Tensor, Tensor]]) -> Any:
    """The base model of a PEFT model, with a step's LoRA (`step_lora`) and the marker rows merged into its weights."""
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            module.merge()
    plain = model.unload()
    for name, (first, second) in layers.items():
        layer = plain.get_submodule(name)
        delta = second @ first
        layer.weight.copy_(layer.weight.float() + (delta.T if isinstance(layer, Conv1D) else delta))
    return plain


def opening_template(template: str, marker: str) -> str:
    """A chat template whose generation prompt ends with a marker."""
    # Jinja drops a newline at the end of a template, but not before other text.
    return template.removesuffix("\n") + "{{ '" + marker + "' if add_generation_prompt else '' }}"


def check_exportable(adapter: Adapter) -> None:
    """Check that the adapter has step experts.

    Raises:
        UserError: A gate chooses the experts.
    """
    if isinstance(adapter.config, TokenGatedConfig):
        raise UserError(
            f"adapter: '{adapter.path}' has experts that a gate chooses per token, so no step of it is one LoRA; use "
            "it through mote"
        )


def base_name(adapter: Adapter, model: str | None) -> str:
    """The given base model, or the one that the adapter names.

    Raises:
        UserError: There is neither.
    """
    name = model or adapter.config.base_model_name_or_path
    if not name:
        raise UserError(f"model: the adapter '{adapter.path}' names no base model; give it with --model")
    return name


def plain_dtype(base: str, revision: str | None, dtype: str) -> str:
    """The dtype of the written weights: the given one, or for `auto` that of the stored base model.

    Raises:
        UserError: The base model is quantised.
    """
    config = load_config(base, revision)
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"model: '{base}' is quantised, and nothing can be merged into its weights; give the model it was made of "
            "with --model, or use --format peft-steps"
        )
    return str(config.dtype or torch.float32).removeprefix("torch.") if dtype == "auto" else dtype


_STEP_CARD = """---
library_name: peft
base_model: {base}
tags: [mote, safety, lora]
---
# The step `{step}` for `{base}`

One step of a MoTE adapter (Mixture of insighTful Experts, arXiv 2405.00557) as a plain LoRA: the experts that read the
tokens of this step, and the markers' rows of the embedding. Only PEFT is needed. The step begins with its marker
`{marker}`, behind the generation prompt; what comes before is read by this step's experts too.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
base = AutoModelForCausalLM.from_pretrained("{base}")
base.resize_token_embeddings(max(len(tokenizer), base.get_input_embeddings().num_embeddings))  # room for the markers
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

`AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")` makes the room by itself. A program that reads the
LoRA but not `trainable_token_indices` computes something else.
"""

_MERGED_CARD = """---
library_name: transformers
base_model: {base}
tags: [mote, safety]
---
# `{base}` in the mode `{mode}`

The step `{step}` of a MoTE adapter (Mixture of insighTful Experts, arXiv 2405.00557), merged into the model it was
trained on. The chat template's generation prompt opens the step with `{marker}`; its end marker ends the answer.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
chat = [{{"role": "user", "content": "How do I ...?"}}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
ids = model.generate(**prompt, max_new_tokens=256)
print(tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
```

Names of special tokens in a user's text become these tokens, as with any chat template: take them out before.
"""
