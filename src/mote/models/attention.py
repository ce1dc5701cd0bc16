"""CPU attention: SDPA with grouped query heads, which transformers' own `sdpa` does not use with a mask.

transformers repeats keys and values for every query head before a masked SDPA call, to stay on the GPU's fast kernels.
The CPU kernel takes grouped heads with a mask: decoding 16 rows behind 300 tokens takes 0.76 of the time, and 0.66 with
a preallocated cache (benchmarks/generation.json, docs/decisions/0013).
Shapes: B row, H query head, K key head, T query, C key, D head dimension.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED_SDPA = "grouped_sdpa"


class DocumentMask(Tensor):
    """A bool mask (B, 1, T, T) that knows the documents of its rows, none of which attends to another.

    Operations on it return a plain mask, so that models that combine masks (Doge) are computed as with any other mask.

    Attributes:
        documents: Of each row, in order: the length of each document, and whether its mask is plainly causal.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    documents: list[list[tuple[int, bool]]]


def grouped_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`sdpa_attention_forward` of transformers without the repeated heads; falls back to it for other arguments.

    Args:
        module: The attention layer.
        query: (B, H, T, D).
        key: (B, K, C, D) with H a multiple of K.
        value: (B, K, C, D).
        attention_mask: (B, 1, T, C), bool or additive, or None for plain causal attention.
        dropout: Dropout on the weights.
        scaling: Factor on the scores.
        is_causal: Overrides the layer's setting.
        kwargs: Arguments of other attention functions.

    Returns:
        The output (B, T, H, D) and None for the attention weights.
    """
    if kwargs.get("position_bias") is not None or kwargs.get("cache") is not None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
        return out, None
    if isinstance(attention_mask, DocumentMask):
        return _by_document(query, key, value, attention_mask, dropout, scaling).transpose(1, 2).contiguous(), None
    causal = bool(is_causal if is_causal is not None else getattr(module, "is_causal", True))
    causal = causal and attention_mask is None and query.shape[2] > 1
    # More keys than queries: an empty static cache, or the last tokens in Gemma 4's layers that share keys.
    if causal and query.shape[2] < key.shape[2] and getattr(module, "is_kv_shared_layer", False):
        shape = query.shape[2], key.shape[2]
        attention_mask = torch.ones(shape, dtype=torch.bool, device=key.device).tril(shape[1] - shape[0])
        causal = False
    if _decodes_groups(query, key, attention_mask):
        return _grouped_as_queries(query, key, value, attention_mask, dropout, scaling), None
    out = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
        is_causal=causal,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous(), None


def _decodes_groups(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Whether there is one query of several heads to a key head, with one mask for all heads."""
    return query.shape[2] == 1 and query.shape[1] != key.shape[1] and (mask is None or mask.shape[1] == 1)


def _grouped_as_queries(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scaling: float | None
) -> Tensor:
    """Attention (B, 1, H, D) of one query a row, its heads taken as queries of their key head.

    Each key is read once for the heads of its group instead of once a head. Equals SDPA with `enable_gqa`, its
    reference; a call takes 0.1 of its time in bfloat16 (1,800 keys, six heads a key head) and 0.6 in float32.
    """
    rows, heads, _, size = query.shape
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], size)
    out = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return out.reshape(rows, 1, heads, size)


def _by_document(
    query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask, dropout: float, scaling: float | None
) -> Tensor:
    """Attention (B, H, T, D) computed for each document alone, so that masked blocks between documents cost nothing.

    Equals SDPA with the whole mask, its reference, except on padding, which nothing attends to.
    """
    edges_B_T_T = mask.as_subclass(Tensor)[:, 0]
    rows = []
    for row, documents in enumerate(mask.documents):
        lengths = [length for length, _ in documents]
        parts = []
        begin = 0
        pieces = zip(*(torch.split(whole[row], lengths, dim=1) for whole in (query, key, value)), strict=True)
        for (length, sees_all), (q, k, v) in zip(documents, pieces, strict=True):
            end = begin + length
            parts.append(
                torch.nn.functional.scaled_dot_product_attention(
                    q[None],
                    k[None],
                    v[None],
                    attn_mask=None if sees_all else edges_B_T_T[row, begin:end, begin:end],
                    dropout_p=dropout,
                    scale=scaling,
                    is_causal=sees_all,
                    enable_gqa=query.shape[1] != key.shape[1],
                )
            )
            begin = end
        rows.append(torch.cat(parts, dim=2))
    return torch.cat(rows)


AttentionInterface.register(GROUPED_SDPA, grouped_sdpa)
AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)
