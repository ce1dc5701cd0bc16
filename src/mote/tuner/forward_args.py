"""Infer past length and packing boundaries from the arguments of a model's forward.

Knows transformers' arguments and nothing of steps.
Shapes: B row, T token.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from mote.models.kv_cache import given_cache
from mote.models.layers import indexed_scaling, masked_kinds, stateful_layers
from mote.models.rope import original_length
from mote.tokens.masks import Layout, mask_form, masks_for


def packed_documents(call: Mapping[str, Any]) -> Tensor | None:
    """The document of each token (B, T) if transformers' own arguments say that rows are packed.

    Without a mask and a cache, transformers starts a new document wherever positions do not follow each other, and so
    do we (`DataCollatorWithFlattening`, padding-free training).
    """
    documents = call.get("seq_idx")
    if isinstance(documents, Tensor):
        return documents.long()
    if call.get("attention_mask") is not None or given_cache(call) is not None:
        return None
    ids = call.get("input_ids")
    positions = call.get("position_ids")
    if not isinstance(ids, Tensor) or not isinstance(positions, Tensor) or positions.shape[1:] != ids.shape[1:]:
        return None
    return (positions.diff(prepend=positions[:, :1] - 1) != 1).cumsum(1).expand(len(ids), -1)


def _check_no_document_follows(documents_B_T: Tensor, starts_B_T: Tensor, layers: str) -> None:
    """Check that no document comes right after another one: only a new row resets a layer's state.

    Raises:
        ValueError: One does.
    """
    real_B_T = documents_B_T >= 0  # not padding
    if bool((starts_B_T[:, 1:] & real_B_T[:, 1:] & real_B_T[:, :-1]).any()):
        raise ValueError(
            f"document_ids: layers of {layers}, which goes from one document to the next; give each document its own "
            "row"
        )


def _check_one_rotary_regime(positions: Tensor, config: Any) -> None:
    """Check that no document is so long that the base model rotates all documents by its length.

    Raises:
        ValueError: One is.
    """
    original = None if config is None else original_length(config)
    if original is not None and int(positions.max()) >= original:
        raise ValueError(
            f"document_ids: a document is longer than {original} tokens, and this base model chooses the rotary "
            "frequencies of all documents by the longest one; give each document a separate forward pass"
        )


def separate_documents(
    call: Mapping[str, Any], documents_B_T: Tensor, names: Collection[str], config: Any
) -> dict[str, Any]:
    """Forward arguments that stop the documents of a packed row from attending to each other.

    transformers detects documents where position ids restart, and only without a mask and a cache. Padding becomes a
    document too. A mask that is not 2-D and a given cache are left unchanged: the caller does its own packing.

    Args:
        call: Arguments of the model's forward by name.
        documents_B_T: Document of each token.
        names: Names of the model's arguments.
        config: The base model's configuration. Models with chunked attention are given masks of our own: transformers
            counts chunks from the beginning of the row.

    Returns:
        The arguments to change; none if each row is one document.

    Raises:
        ValueError: The model keeps a state over documents or takes no positions, or `position_ids` run on from one
            document to the next, or the row is so long that the base model scales tokens by their index in it, or a
            document is so long that the base model rotates all documents by its length.
    """
    mask = call.get("attention_mask")
    if given_cache(call) is not None or torch.compiler.is_compiling() or "attention_mask" not in names:
        return {}
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        return {}
    starts_B_T = torch.ones_like(documents_B_T, dtype=torch.bool)
    starts_B_T[:, 1:] = documents_B_T.diff(dim=1) != 0
    if not bool(starts_B_T[:, 1:].any()):
        return {}
    if config is not None and call.get("seq_idx") is None and (stateful := stateful_layers(config)):
        _check_no_document_follows(
            documents_B_T, starts_B_T, f"{config.model_type} keep a state ({', '.join(stateful)})"
        )
        return {}
    if "position_ids" not in names:
        raise ValueError(
            "document_ids: this model takes no position_ids, so its documents would attend to each other; give each "
            "document its own row"
        )
    changed: dict[str, Any] = {"attention_mask": None, **({"use_cache": False} if "use_cache" in names else {})}
    if mask is not None:
        starts_B_T[:, 1:] |= mask.to(starts_B_T.device).diff(dim=1) != 0
    positions = call.get("position_ids")
    if positions is None:
        index_T = torch.arange(starts_B_T.shape[1], device=starts_B_T.device)
        changed["position_ids"] = index_T - torch.where(starts_B_T, index_T, 0).cummax(dim=1).values
    elif bool((positions.diff(dim=-1) == 1).logical_and(starts_B_T[:, 1:].to(positions.device)).any()):
        raise ValueError(
            "position_ids: they run on from one document of `document_ids` to the next, which would then attend to it; "
            "let them begin at 0 in each document, or leave them out"
        )
    used: Any = changed.get("position_ids", positions)
    _check_one_rotary_regime(used, config)
    if config is not None and any(layer.kind == "chunked" for layer in masked_kinds(config)):
        changed["attention_mask"] = _chunked_masks(starts_B_T, used.to(starts_B_T.device), config)
    return changed


def _chunked_masks(starts_B_T: Tensor, positions: Tensor, config: Any) -> Any:
    """Masks of packed documents for a base model with chunked attention, whose chunks begin with each document.

    Raises:
        ValueError: The row is so long that the base model scales tokens by their index in it.
    """
    if (longest := indexed_scaling(config)) is not None and starts_B_T.shape[1] >= longest:
        raise ValueError(
            f"document_ids: this base model scales attention by a token's index in its row from {longest} tokens on; "
            "pack shorter rows, or give each document its own row"
        )
    alike = torch.zeros_like(starts_B_T, dtype=torch.long)  # one segment, which every token sees
    visible = torch.ones_like(starts_B_T)[..., None]
    make_masks = masks_for(config, mask_form(config._attn_implementation))
    return make_masks(Layout(alike, visible, starts_B_T.cumsum(1), positions.expand(len(starts_B_T), -1)))


def kept_positions(call: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Forward arguments that name the positions of `logits_to_keep` where their number has side effects.

    From transformers 5.24 on, Gemma 4 computes its layers without keys and values of their own for the last
    `logits_to_keep` tokens only, and experts need all. On a CPU, PyTorch copies a frozen bfloat16 head for each row
    where a number makes transformers cut a slice that is not contiguous (findings/logits_to_keep_copies_the_head.sh).
    """
    keep = call.get("logits_to_keep")
    ids = call.get("input_ids") if call.get("input_ids") is not None else call.get("inputs_embeds")
    if not isinstance(keep, int) or keep == 0 or ids is None or ids.shape[1] <= keep:
        return {}
    shared = config is not None and getattr(config.get_text_config(decoder=True), "num_kv_shared_layers", None)
    if not shared and ids.device.type != "cpu":
        return {}
    length = ids.shape[1]
    return {"logits_to_keep": torch.arange(length - keep, length, device=ids.device)}


def has_past(call: Mapping[str, Any]) -> bool:
    """Whether a KV cache of any kind holds tokens before those of this forward pass."""
    cache = given_cache(call)
    if not isinstance(cache, Cache):
        return cache is not None or call.get("state") is not None  # the caches of continuous batching and of RWKV
    length = cache_length(cache)
    if length is None:
        return bool(cache.has_previous_state())
    if isinstance(length, Tensor) and torch.compiler.is_compiling():
        return True  # the value is unknown while compiling
    return bool(length > 0)


def cache_length(cache: Any) -> int | Tensor | None:
    """Number of tokens in a cache.

    Returns:
        For a static cache possibly a tensor on its device; None for recurrent layers alone, which do not count them.
    """
    if not isinstance(cache, Cache):
        return 0
    if cache.layers and all(cache.is_linear):
        return None
    length: int | Tensor = cache.get_seq_length()
    return length
