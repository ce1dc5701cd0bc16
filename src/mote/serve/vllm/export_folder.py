"""A trained adapter as a folder for vLLM: base model, experts, routing and a tokenizer that has no text for a marker.

The markers' rows are in the embedding and the output head, one more row is a twin of the token that prompts begin
with, others fill the vocabulary up, and the experts stand beside the base model's weights under their layers' names.
Needs no vLLM.
Shapes: D model (in, out), E expert, R rank.
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
from mote.core.files import check_new, whole, writing
from mote.core.records import Message
from mote.core.scheme import ADAPTIVE, BASE, Scheme
from mote.inference.load import adapter_config, load
from mote.serve.export import PREFIX, base_name, check_exportable, merge_step, plain_dtype
from mote.serve.vllm.folder_config import Served
from mote.tokens.encode import encode_prompt, special_ids
from mote.tuner import MoteConfig
from mote.tuner.expert_weights import expert_weight_table

ARCHITECTURES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3")  # vLLM's classes that have experts here
EXPERTS = "experts.safetensors"
WHOLE = 64  # vLLM's vocabularies are a multiple of it


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
        out: Folder to make.
        mode: Mode of a request that names none.
        model: Base model; the one that the adapter names where none is given.
        dtype: `auto` (as the base model is stored), `float32`, `bfloat16` or `float16`.
        revision: Hub revision of the base model.
        max_step_tokens: Budget of a step in a request that gives none.

    Returns:
        The folder.

    Raises:
        UserError: No adapter of step experts with its tokenizer, no such base model, another one than the adapter's, a
            quantised one or one that vLLM has no class with experts for, no such mode, or `out` is not new.
        MoteError: The disk refused the files.
    """
    check_new(out)
    config = adapter_config(adapter)
    check_exportable(adapter, config)
    if config.whole_rows:
        raise UserError(
            f"adapter: '{adapter}' is a model for each step, which reads all of a text anew; use `mote answer`, or "
            "--format engine-steps"
        )
    base = base_name(adapter, config, model)
    loaded = load(base, adapter, device="cpu", dtype=plain_dtype(base, revision, dtype), revision=revision)
    if mode == BASE or mode not in loaded.scheme.modes:
        raise UserError(f"mode: '{mode}' cannot be the served model's own; use one of {list(loaded.scheme.modes[1:])}")
    name = type(loaded.base.model).__name__
    if name not in [f"{known}ForCausalLM" for known in ARCHITECTURES]:
        raise UserError(f"model: '{base}' is a {name}; vLLM is served {', '.join(ARCHITECTURES)} with step experts")
    opening = encode_prompt(loaded.tokenizer, (Message(role="user", content="?"),))[0]
    markers = [id_ for pair in config.markers.values() for id_ in pair]
    twin = max(len(loaded.tokenizer), max(markers) + 1)
    plain = merge_step(loaded.model, {})
    unused = _add_twin(plain, opening, twin)
    experts, rank = padded_experts(config, load_peft_weights(adapter, device="cpu"))
    served = Served(
        experts=config.experts,
        markers={step: (start, end) for step, (start, end) in config.markers.items()},
        turns=tuple(config.turn_ids),
        opening=(opening, twin),
        unused=unused,
        gates=tuple(tuple(row) for row in expert_weight_table(config).tolist()),
        rank=rank,
        modes=_modes(loaded.scheme),
        mode=mode,
        answer=loaded.scheme.answer,
        max_step_tokens=max_step_tokens,
        special=tuple(sorted(special_ids(loaded.tokenizer))),
        eos=loaded.tokenizer.eos_token_id,
    )
    tokenizer = without_markers(loaded.tokenizer, served)
    plain.config.update({"mote": served.model_dump(mode="json")})
    plain.generation_config.eos_token_id = [config.markers[served.answer][1], served.eos]
    with writing("export", out, "run the same command again"), whole(out) as scratch:
        plain.save_pretrained(scratch)
        given = json.loads((scratch / "config.json").read_text(encoding="utf-8"))
        given["architectures"] = [f"Mote{name}"]
        (scratch / "config.json").write_text(json.dumps(given, indent=2), encoding="utf-8")
        save_file(experts, scratch / EXPERTS, metadata={"format": "pt"})
        _index(scratch, experts)
        tokenizer.save_pretrained(scratch)
        (scratch / "README.md").write_text(_CARD.format(base=base, mode=mode, name=out.name), encoding="utf-8")
    return out


def _index(folder: Path, experts: Mapping[str, Tensor]) -> None:
    """Name the experts' file in the index of a model of several files, without which vLLM passes it over."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        named = json.loads(index.read_text(encoding="utf-8"))
        named["weight_map"] |= dict.fromkeys(experts, EXPERTS)
        index.write_text(json.dumps(named, indent=2), encoding="utf-8")


def padded_experts(config: MoteConfig, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """The experts by their layers' names, all of one rank, with the scaling multiplied into B.

    Args:
        config: The adapter's configuration.
        tensors: The adapter's tensors by their names in its file.

    Returns:
        `<layer>.mote_A` (E*R, in) and `<layer>.mote_B` (out, E*R) in float32, and R.
    """
    names = [name for name in tensors if ".mote_A." in name]
    count = config.total_experts
    most = max(len(tensors[name]) // count for name in names)
    padded = {}
    for name in names:
        first, second = tensors[name].float(), tensors[name.replace(".mote_A.", ".mote_B.")].float()
        rank = len(first) // count
        room = (0, 0, 0, most - rank)
        layer = name.removeprefix(PREFIX).partition(".mote_A.")[0]
        first = torch.nn.functional.pad(first.view(count, rank, -1), room)
        second = torch.nn.functional.pad(second.T.reshape(count, rank, -1), room)
        padded[f"{layer}.mote_A"] = first.flatten(0, 1)
        padded[f"{layer}.mote_B"] = (config.scaling(rank) * second.flatten(0, 1).T).contiguous()
    return padded, most


def without_markers(tokenizer: Any, served: Served) -> Any:
    """The tokenizer without the markers: no text becomes one, whatever a server does with it.

    Raises:
        UserError: A marker is also a word of the tokenizer's own, which a text could hold.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["id"] not in served.reserved]
    kept = {token["content"]: token["id"] for token in backend["added_tokens"]}
    made = type(tokenizer.backend_tokenizer).from_str(json.dumps(backend))
    known = sorted(name for name, id_ in made.get_vocab().items() if id_ in served.reserved)
    if known:
        raise UserError(f"adapter: its markers are on the ids of {known}, which a text can hold; train it on new ids")
    plain = type(tokenizer)(tokenizer_object=made)
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        setattr(plain, name, getattr(tokenizer, name))
    extra = [name for name in tokenizer.extra_special_tokens if name in kept]
    plain.add_special_tokens({"additional_special_tokens": extra})
    plain.chat_template, plain.model_max_length = tokenizer.get_chat_template(), tokenizer.model_max_length
    return plain


@torch.no_grad()
def _add_twin(model: Any, opening: int, twin: int) -> tuple[int, ...]:
    """Give the embedding a row `twin` like that of `opening`, and fill it up: vLLM copies logits that it has to cut.

    Returns:
        The rows that fill up.
    """
    before = model.get_input_embeddings().weight.shape[0]
    if before <= twin:
        model.resize_token_embeddings(twin + 1, pad_to_multiple_of=WHOLE, mean_resizing=False)
    unused = range(max(before, twin + 1), model.get_input_embeddings().weight.shape[0])
    for matrix in (model.get_input_embeddings(), model.get_output_embeddings()):
        matrix.weight[twin] = matrix.weight[opening]
        matrix.weight[list(unused)] = 0
    return tuple(unused)


def _modes(scheme: Scheme) -> dict[str, tuple[tuple[str, ...], ...]]:
    return {mode: scheme.chains_of(mode) for mode in scheme.modes if mode != BASE}


_CARD = """---
library_name: vllm
base_model: {base}
tags: [mote, safety]
---
# `{base}` with step experts, for vLLM

A MoTE adapter (Mixture of insighTful Experts, arXiv 2405.00557) on its base model. vLLM serves it where `mote-align` is
installed beside it, and refuses it elsewhere:

```bash
vllm serve path/to/this/folder --served-model-name {name}
```

A request that names no mode is answered in the mode `{mode}`. The tokenizer has no text for the step markers, so that
only the model writes them.
"""
