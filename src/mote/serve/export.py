"""A trained adapter as files that need no `mote`: a plain PEFT LoRA for each step, or a model with one step merged in.

The experts that read the tokens of one step, the step's own and the shared one, are one LoRA of twice the rank
(docs/decisions/0014). What is exported reads every token with them, the question too.
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
from mote.tuner.experts import fold
from mote.tuner.token_gated import TokenGatedConfig

PREFIX = "base_model.model."  # of PEFT's names of the base model's modules
_AGAIN = "run the same command again"


def export_steps(adapter: str, out: Path, model: str | None = None, revision: str | None = None) -> list[Path]:
    """Write a plain LoRA for each step expert to OUT/<step>/, from the adapter alone.

    Args:
        adapter: Folder of a trained adapter, or a hub id.
        out: Folder to make.
        model: Base model that the LoRAs name; the adapter's where none is given. Its weights are not read.
        revision: Hub revision of the base model.

    Returns:
        The folders, in the order of the steps.

    Raises:
        UserError: No adapter of step experts with its tokenizer, no such base model, or `out` is not new.
        MoteError: The disk refused the files.
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
    """Write the base model with the markers' rows to OUT/base/, and a LoRA without rows for each step to OUT/<step>/.

    For engines that read LoRAs but no rows of the embedding, such as vLLM without a plugin.

    Args:
        adapter: Folder of a trained adapter, or a hub id.
        out: Folder to make.
        model: Base model; the one that the adapter names where none is given.
        dtype: Of the base model: `auto` (as it is stored), `float32`, `bfloat16` or `float16`.
        revision: Hub revision of the base model.

    Returns:
        The folders, the base model's first.

    Raises:
        UserError: The base model is quantised or another one than the adapter's, or as in `export_steps`.
        MoteError: The disk refused the files.
    """
    check_new(out)
    trained = read_adapter(adapter)
    check_exportable(trained)
    config = trained.config
    name = base_name(trained, model)
    loaded = load(name, trained, device="cpu", dtype=plain_dtype(name, revision, dtype), revision=revision)
    tensors, plain = load_peft_weights(adapter, device="cpu"), merge_step(loaded.model, {})
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
    """Write a step's LoRA, and with it the given rows of the embedding."""
    layers = step_lora(config, tensors, step)
    lora_config(config, layers, base, revision, bool(rows)).save_pretrained(folder)
    state = {f"{PREFIX}{name}.lora_A.weight": first for name, (first, _) in layers.items()}
    state |= {f"{PREFIX}{name}.lora_B.weight": second for name, (_, second) in layers.items()}
    save_file(state | rows, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def step_lora(config: MoteConfig, tensors: Mapping[str, Tensor], step: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The experts of one step as plain LoRA, with mix and scaling multiplied into B.

    Args:
        config: The adapter's configuration.
        tensors: The adapter's tensors by their names in its file.
        step: Name of the step.

    Returns:
        Module name in the base model -> A (2R, in) and B (out, 2R) in float32; R where there is no shared expert.
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
    """The configuration of a step's LoRA: the layers by their names, `lora_alpha` such that each is scaled by 1.

    Args:
        config: The adapter's configuration.
        layers: Of the step, see `step_lora`.
        base: The base model's name.
        revision: Its hub revision.
        rows: Whether the markers' rows of the embedding go with it.
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

    Its logits are those of the adapter with all tokens read by that step's experts: `question_expert` names the step.

    Args:
        adapter: Folder of a trained adapter, or a hub id.
        out: Folder to make.
        mode: A mode of one step.
        model: Base model; the one that the adapter names where none is given.
        dtype: `auto` (as the base model is stored), `float32`, `bfloat16` or `float16`. Merging is done in float32.
        revision: Hub revision of the base model.

    Returns:
        The folder.

    Raises:
        UserError: The mode has more than one step, the base model is quantised or another one than the adapter's, or
            as in `export_steps`.
        MoteError: The disk refused the files.
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
    plain, tokenizer = merge_step(loaded.model, layers), loaded.tokenizer
    ends = [config.markers[step][1], *stop_ids(tokenizer, loaded.base.model)]
    plain.config.eos_token_id = plain.generation_config.eos_token_id = ends
    # As the grammar of `mote answer` has it, no step holds a special token.
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
        f"mode: '{mode}' cannot be merged: a merged model reads all tokens with one step's experts; use one of "
        f"{possible}, or --format peft-steps for each step by itself"
    )


@torch.no_grad()
def merge_step(model: Any, layers: Mapping[str, tuple[Tensor, Tensor]]) -> Any:
    """The base model of a PEFT model, with a step's LoRA (`step_lora`) and the markers' rows in its weights."""
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
    """A chat template whose generation prompt goes on with a marker."""
    # Jinja drops one newline at the end of a template, and no longer where something follows.
    return template.removesuffix("\n") + "{{ '" + marker + "' if add_generation_prompt else '' }}"


def check_exportable(adapter: Adapter) -> None:
    """Make sure that the experts are those of steps.

    Raises:
        UserError: A gate chooses them.
    """
    if isinstance(adapter.config, TokenGatedConfig):
        raise UserError(
            f"adapter: '{adapter.path}' has experts that a gate chooses per token, so no step of it is one LoRA; use "
            "it through mote"
        )


def base_name(adapter: Adapter, model: str | None) -> str:
    """The base model that is given, or that the adapter names.

    Raises:
        UserError: Neither.
    """
    name = model or adapter.config.base_model_name_or_path
    if not name:
        raise UserError(f"model: the adapter '{adapter.path}' names no base model; give it with --model")
    return name


def plain_dtype(base: str, revision: str | None, dtype: str) -> str:
    """The dtype to write weights in: the one that is given, or for `auto` the one the base model is stored in.

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
