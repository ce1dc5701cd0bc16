"""Exports a trained adapter to a folder for vLLM: base model, experts, routing, and a tokenizer without the markers.

The embedding and output head include the marker rows, a twin of the token that prompts start with, and padding rows.
The experts are saved beside the base model's weights under their layers' names. Needs no vLLM.
Shapes: E expert, R rank; in and out are a layer's features.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils import load_peft_weights
from safetensors.torch import save_file
from torch import Tensor

from mote.core.errors import UserError
from mote.core.files import atomic_folder, check_new, disk_errors
from mote.core.scheme import ADAPTIVE, BASE
from mote.inference.load import load, read_adapter
from mote.inference.model import Model
from mote.models.capabilities import capabilities_of
from mote.models.load import load_config
from mote.serve.export import PREFIX, base_name, check_exportable, merge_step, plain_dtype
from mote.serve.vllm.folder_config import ServedConfig
from mote.tokens.encode import opening_id, special_ids, stop_ids
from mote.tuner import MoteConfig
from mote.tuner.expert_weights import expert_weight_table

EXPERTS = "experts.safetensors"
VOCAB_MULTIPLE = 64  # vLLM pads vocabularies to a multiple of this


def export_vllm(
    adapter: str,
    out: Path,
    mode: str = ADAPTIVE,
    model: str | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    max_step_tokens: int = 256,
) -> Path:
    """Write the folder.

    Args:
        adapter: Folder of a trained adapter, or a hub id.
        out: Folder to create.
        mode: Default mode of a request.
        model: Base model; by default the one that the adapter names.
        dtype: `auto` (as the base model is stored), `float32`, `bfloat16` or `float16`.
        revision: Hub revision of the base model.
        max_step_tokens: Default token budget of a step.

    Returns:
        The folder.

    Raises:
        UserError: `adapter` has no step experts or no tokenizer; the base model does not exist, is not the adapter's,
            is quantised or has an unsupported architecture; `mode` does not exist; or `out` exists.
        MoteError: The files cannot be written.
    """
    check_new(out)
    trained = read_adapter(adapter)
    check_exportable(trained)
    config = trained.config
    base = base_name(trained, model)
    dtype = plain_dtype(base, revision, dtype)
    _check_servable(adapter, config.whole_rows, base, revision)
    loaded = load(base, trained, device="cpu", dtype=dtype, revision=revision)
    if mode == BASE or mode not in loaded.scheme.modes:
        raise UserError(f"mode: '{mode}' cannot be the served model's own; use one of {list(loaded.scheme.modes[1:])}")
    architecture = type(loaded.base.model).__name__
    plain = merge_step(loaded.model, {})
    experts, rank = padded_experts(config, load_peft_weights(adapter, device="cpu"))
    served = _served_config(loaded, config, plain, rank, mode, max_step_tokens)
    tokenizer = without_markers(loaded.tokenizer, served)
    plain.config.update({"mote": served.model_dump(mode="json")})
    stops = stop_ids(loaded.tokenizer, loaded.base.model)
    plain.generation_config.eos_token_id = [config.markers[served.answer][1], *stops]
    with disk_errors("export", out, "run the same command again"), atomic_folder(out) as scratch:
        plain.save_pretrained(scratch)
        _edit_json(scratch / "config.json", {"architectures": [f"Mote{architecture}"]})
        save_file(experts, scratch / EXPERTS, metadata={"format": "pt"})
        index = scratch / "model.safetensors.index.json"
        if index.exists():  # of a sharded model; vLLM skips files that it does not name
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            _edit_json(index, {"weight_map": weight_map | dict.fromkeys(experts, EXPERTS)})
        tokenizer.save_pretrained(scratch)
        (scratch / "README.md").write_text(_CARD.format(base=base, mode=mode, name=out.name), encoding="utf-8")
    return out


def _check_servable(adapter: str, whole_rows: bool, base: str, revision: str | None) -> None:
    """Check that vLLM can run the adapter and its base model.

    Raises:
        UserError: It cannot.
    """
    if whole_rows:
        raise UserError(
            f"adapter: '{adapter}' is a model for each step (train.method=separate), which vLLM cannot run as one; use "
            "`mote answer`, or --format engine-steps"
        )
    if (limit := capabilities_of(load_config(base, revision)).limits.get("vllm")) is not None:
        raise UserError(f"model: '{base}': {limit}")


def _served_config(
    loaded: Model, config: MoteConfig, plain: Any, rank: int, mode: str, max_step_tokens: int
) -> ServedConfig:
    """The config of the served model; adds the twin and padding rows to `plain`."""
    opening = opening_id(loaded.tokenizer)
    marker_ids = [id_ for pair in config.markers.values() for id_ in pair]
    twin = max(len(loaded.tokenizer), max(marker_ids) + 1)
    return ServedConfig(
        experts=config.experts,
        markers={step: (start, end) for step, (start, end) in config.markers.items()},
        turns=tuple(config.turn_ids),
        opening=(opening, twin),
        unused=_add_twin(plain, opening, twin),
        gates=tuple(tuple(row) for row in expert_weight_table(config).tolist()),
        rank=rank,
        modes={mode: loaded.scheme.chains_of(mode) for mode in loaded.scheme.modes if mode != BASE},
        mode=mode,
        answer=loaded.scheme.answer,
        max_step_tokens=max_step_tokens,
        special=tuple(sorted(special_ids(loaded.tokenizer).union(stop_ids(loaded.tokenizer, loaded.base.model)))),
        eos=loaded.tokenizer.eos_token_id,
    )


def _edit_json(path: Path, changes: dict[str, Any]) -> None:
    """Replace top-level keys of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | changes, indent=2), encoding="utf-8")


def padded_experts(config: MoteConfig, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """The experts by layer name, zero-padded to one rank, with the scaling folded into `lora_B`.

    Args:
        config: The adapter's configuration.
        tensors: The adapter's tensors by their names in its file.

    Returns:
        `<layer>.mote_A` (E*R, in) and `<layer>.mote_B` (out, E*R) in float32, and R.
    """
    names = [name for name in tensors if ".mote_A." in name]
    count = config.total_experts
    max_rank = max(len(tensors[name]) // count for name in names)
    padded = {}
    for name in names:
        lora_A = tensors[name].float()
        lora_B = tensors[name.replace(".mote_A.", ".mote_B.")].float()
        rank = len(lora_A) // count
        padding = (0, 0, 0, max_rank - rank)
        layer = name.removeprefix(PREFIX).partition(".mote_A.")[0]
        lora_A = torch.nn.functional.pad(lora_A.view(count, rank, -1), padding)
        lora_B = torch.nn.functional.pad(lora_B.T.reshape(count, rank, -1), padding)
        padded[f"{layer}.mote_A"] = lora_A.flatten(0, 1)
        padded[f"{layer}.mote_B"] = (config.scaling(rank) * lora_B.flatten(0, 1).T).contiguous()
    return padded, max_rank


def without_markers(tokenizer: Any, served: ServedConfig) -> Any:
    """The tokenizer without the markers, so that no text encodes to one however it is tokenised.

    Raises:
        UserError: A marker's id is also an ordinary token of the tokenizer.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["id"] not in served.reserved]
    kept = {token["content"]: token["id"] for token in backend["added_tokens"]}
    made = type(tokenizer.backend_tokenizer).from_str(json.dumps(backend))
    known = sorted(name for name, id_ in made.get_vocab().items() if id_ in served.reserved)
    if known:
        raise UserError(
            f"adapter: its markers are on the ids of {known}, which text can encode to; train it on new ids"
        )
    plain = type(tokenizer)(tokenizer_object=made)
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        setattr(plain, name, getattr(tokenizer, name))
    extra = [name for name in tokenizer.extra_special_tokens if name in kept]
    plain.add_special_tokens({"additional_special_tokens": extra})
    plain.chat_template = tokenizer.get_chat_template()
    plain.model_max_length = tokenizer.model_max_length
    return plain


@torch.no_grad()
def _add_twin(model: Any, opening: int, twin: int) -> tuple[int, ...]:
    """Add the row `twin`, a copy of row `opening`, to embedding and head, and pad the vocabulary.

    Without padding vLLM copies the logits to cut them at every step.

    Returns:
        Ids of the padding rows.
    """
    before = model.get_input_embeddings().weight.shape[0]
    if before <= twin:
        model.resize_token_embeddings(twin + 1, pad_to_multiple_of=VOCAB_MULTIPLE, mean_resizing=False)
    unused = range(max(before, twin + 1), model.get_input_embeddings().weight.shape[0])
    for matrix in (model.get_input_embeddings(), model.get_output_embeddings()):
        matrix.weight[twin] = matrix.weight[opening]
        matrix.weight[list(unused)] = 0
    return tuple(unused)


_CARD = """---
library_name: vllm
base_model: {base}
tags: [mote, safety]
---
# `{base}` with step experts, for vLLM

A MoTE adapter (Mixture of insighTful Experts, arXiv 2405.00557) on its base model. vLLM serves it if `mote-align` is
installed in the same environment, and refuses it otherwise:

```bash
vllm serve path/to/this/folder --served-model-name {name}
```

The default mode is `{mode}`. The tokenizer has no text for the step markers, so only the model can generate them.
"""
