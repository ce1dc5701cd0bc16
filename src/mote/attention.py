"""Attention for a CPU: PyTorch's SDPA with grouped heads, which transformers' own `sdpa` does not use under a mask.

transformers copies keys and values once a query head before a masked SDPA call, to stay on the GPU's fast kernels. The
CPU kernel takes grouped heads with a mask as they are: decoding 16 rows behind 300 tokens takes 0.76 of the time, and
0.66 with a preallocated cache as well (benchmarks/generation.json, docs/decisions/0013).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED_SDPA = "grouped_sdpa"


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
    """Transformers' `sdpa_attention_forward` without the copies; what it does not cover goes to that.

    Args:
        module: The attention layer.
        query: (B, H, T, D).
        key: (B, K, S, D) with H a multiple of K.
        value: (B, K, S, D).
        attention_mask: (B, 1, T, S), bool or additive, or None for plain causal attention.
        dropout: Dropout on the weights.
        scaling: Factor on the scores.
        is_causal: Overrides the layer's own setting.
        kwargs: What other attention functions take.

    Returns:
        The output (B, T, H, D) and no weights.
    """
    if kwargs.get("position_bias") is not None or kwargs.get("cache") is not None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
        return out, None
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    out = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
        is_causal=bool(causal) and attention_mask is None and query.shape[2] > 1,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED_SDPA, grouped_sdpa)
AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)
