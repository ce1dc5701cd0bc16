"""Stores the step of each token in an extra layer of vLLM's KV cache: one byte per token.

Whatever vLLM does with a token's keys and values (prefix sharing, eviction, recomputation in chunks), it does with the
token's step. Shapes: T token of the batch, B request, C token a cache block can hold.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec

from mote.serve.vllm.chunk_steps import chunk_steps, event_table
from mote.serve.vllm.folder_config import ServedConfig
from mote.tokens.routing import QUESTION


@dataclass
class StepMetadata(AttentionMetadata):
    """Layout of a batch.

    Attributes:
        tokens: Number of tokens.
        starts: Index of each request's first token (B + 1,).
        lengths: Sequence length of each request, this batch included (B,).
        blocks: Block table (B, any).
        slots: Cache slot of each token (T,).
    """

    tokens: int
    starts: Tensor
    lengths: Tensor
    blocks: Tensor
    slots: Tensor


class StepMetadataBuilder(AttentionMetadataBuilder[StepMetadata]):
    """Builds `StepMetadata` from the metadata common to all attention backends."""

    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    @override
    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StepMetadata:
        given = common_attn_metadata
        return StepMetadata(
            tokens=given.num_actual_tokens,
            starts=given.query_start_loc,
            lengths=given.seq_lens,
            blocks=given.block_table_tensor,
            slots=given.slot_mapping,
        )


class StepBackend(AttentionBackend):
    """A cache without attention."""

    @staticmethod
    @override
    def get_name() -> str:
        return "MOTE_STEPS"

    @staticmethod
    @override
    def get_impl_cls() -> Any:
        raise NotImplementedError

    @staticmethod
    @override
    def get_builder_cls() -> type[StepMetadataBuilder]:
        return StepMetadataBuilder


class StepCache(nn.Module, AttentionLayerBase):
    """Layer that reads the step before each chunk, routes the batch and stores the steps of its tokens.

    Args:
        served: Config of the served model.
        vocab_size: Number of embedding rows.
        prefix: Name of the layer in vLLM.
    """

    def __init__(self, served: ServedConfig, vocab_size: int, prefix: str) -> None:
        super().__init__()
        self.base = len(served.experts) + 1  # stored for tokens of base-model requests
        self.twin = served.opening[1]
        self.kv_cache = torch.tensor([])
        self.prefix = prefix
        get_current_vllm_config().compilation_config.static_forward_context[prefix] = self
        self.events = event_table(served.routing, vocab_size).to(get_current_vllm_config().device_config.device)

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Bind vLLM's cache (blocks, 1, C, 1), viewed as (blocks, C)."""
        self.kv_cache = kv_cache[:, 0, :, 0]

    def get_kv_cache_spec(self, vllm_config: Any) -> FullAttentionSpec:
        """One byte per token, replicated in every tensor-parallel process."""
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            max_tp_shards=1,
            head_size=1,
            head_size_v=0,
            dtype=torch.int8,
        )

    @override
    def get_attn_backend(self) -> type[AttentionBackend]:
        return StepBackend

    def forward(self, ids_T: Tensor) -> Tensor | None:
        """Step ids (T,) of a batch, without padding; None in vLLM's profiling run, which has no requests."""
        batch = get_forward_context().attn_metadata
        found: StepMetadata | None = batch.get(self.prefix) if isinstance(batch, dict) else None
        if found is None or not self.kv_cache.numel():
            return None
        ids_T = ids_T[: found.tokens]
        slots_T = found.slots[: found.tokens]
        begins_N = found.starts[:-1]
        size = self.kv_cache.shape[1]
        done_N = found.lengths - (found.starts[1:] - begins_N)  # tokens of the request before this chunk
        last_N = (done_N - 1).clamp_min(0)
        block_N = found.blocks.gather(1, (last_N // size)[:, None].to(torch.long))[:, 0]
        before_N = torch.where(done_N > 0, self.kv_cache[block_N.long(), (last_N % size).long()], QUESTION)
        opening_N = ids_T[begins_N.long().clamp_max(len(ids_T) - 1)]
        base_model_N = (before_N == self.base) | ((done_N == 0) & (opening_N == self.twin))
        index_T = torch.arange(len(ids_T), device=ids_T.device)
        request_T = torch.searchsorted(found.starts[1:].contiguous(), index_T.to(found.starts.dtype), right=True)
        steps_T = chunk_steps(ids_T, begins_N[request_T], before_N[request_T], self.events)
        steps_T = torch.where(base_model_N[request_T], self.base, steps_T)
        slots_T = slots_T.clamp_min(0)  # block 0 is vLLM's null block
        self.kv_cache[slots_T // size, slots_T % size] = steps_T.to(torch.int8)
        return steps_T
