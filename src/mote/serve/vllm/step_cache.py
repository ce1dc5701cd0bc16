"""The step of each token, kept in vLLM's KV cache in a layer of its own: one byte a token.

Whatever vLLM does with the keys and values of a token (shares them with another request, frees them, computes them
anew in chunks), it does with the token's step. Shapes: T token of the batch, N request, K block, C slot of a block.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
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
from mote.serve.vllm.folder_config import Served
from mote.tokens.routing import QUESTION


@dataclass
class StepMetadata(AttentionMetadata):
    """Where the tokens of a batch are.

    Attributes:
        tokens: Number of tokens.
        starts: Index of the first token of each request (N + 1,).
        lengths: Tokens of each request up to this batch's last (N,).
        blocks: Cache blocks of each request (N, any).
        slots: Cache slot of each token (T,).
    """

    tokens: int
    starts: Tensor
    lengths: Tensor
    blocks: Tensor
    slots: Tensor


class StepMetadataBuilder(AttentionMetadataBuilder[StepMetadata]):
    """Takes them out of what vLLM tells every attention backend."""

    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StepMetadata:
        """The metadata of a batch."""
        given = common_attn_metadata
        return StepMetadata(
            tokens=given.num_actual_tokens,
            starts=given.query_start_loc,
            lengths=given.seq_lens,
            blocks=given.block_table_tensor,
            slots=given.slot_mapping,
        )


class StepBackend(AttentionBackend):
    """A cache that nobody attends to."""

    @staticmethod
    def get_name() -> str:
        """Its name in vLLM."""
        return "MOTE_STEPS"

    @staticmethod
    def get_impl_cls() -> Any:
        """There is no attention."""
        raise NotImplementedError

    @staticmethod
    def get_builder_cls() -> type[StepMetadataBuilder]:
        """Who makes the metadata."""
        return StepMetadataBuilder


class StepCache(nn.Module, AttentionLayerBase):
    """The layer: reads the step before each chunk, routes the batch, writes the steps of its tokens.

    Args:
        served: Routing of the model.
        vocab_size: Rows of the embedding.
        prefix: Name of the layer in vLLM.
    """

    def __init__(self, served: Served, vocab_size: int, prefix: str) -> None:
        super().__init__()
        self.base = len(served.experts) + 1  # behind the steps: the base model's tokens
        self.twin = served.opening[1]
        self.kv_cache = torch.tensor([])
        self.prefix = prefix
        get_current_vllm_config().compilation_config.static_forward_context[prefix] = self
        self.events = event_table(served.routing, vocab_size).to(get_current_vllm_config().device_config.device)

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Take the cache (K, 1, C, 1) that vLLM has made, as (K, C)."""
        self.kv_cache = kv_cache[:, 0, :, 0]

    def get_kv_cache_spec(self, vllm_config: Any) -> FullAttentionSpec:
        """One byte a token, of which every tensor-parallel process keeps its own copy."""
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            max_tp_shards=1,
            head_size=1,
            head_size_v=0,
            dtype=torch.int8,
        )

    def get_attn_backend(self) -> type[AttentionBackend]:
        """Who makes the metadata of a batch."""
        return StepBackend

    def forward(self, ids_T: Tensor) -> Tensor | None:
        """Steps (T,) of a batch's tokens, without padding; None in a trial run of vLLM, which has no requests."""
        batch = get_forward_context().attn_metadata
        found: StepMetadata | None = batch.get(self.prefix) if isinstance(batch, dict) else None
        if found is None or not self.kv_cache.numel():
            return None
        ids_T, slots_T = ids_T[: found.tokens], found.slots[: found.tokens]
        begins_N, size = found.starts[:-1], self.kv_cache.shape[1]
        done_N = found.lengths - (found.starts[1:] - begins_N)  # tokens of the request before this batch
        last_N = (done_N - 1).clamp_min(0)
        block_N = found.blocks.gather(1, (last_N // size)[:, None].to(torch.long))[:, 0]
        before_N = torch.where(done_N > 0, self.kv_cache[block_N.long(), (last_N % size).long()], QUESTION)
        opening_N = ids_T[begins_N.long().clamp_max(len(ids_T) - 1)]
        of_base_N = (before_N == self.base) | ((done_N == 0) & (opening_N == self.twin))
        index_T = torch.arange(len(ids_T), device=ids_T.device)
        request_T = torch.searchsorted(found.starts[1:].contiguous(), index_T.to(found.starts.dtype), right=True)
        steps_T = chunk_steps(ids_T, begins_N[request_T], before_N[request_T], self.events)
        steps_T = torch.where(of_base_N[request_T], self.base, steps_T)
        slots_T = slots_T.clamp_min(0)  # block 0 is nobody's
        self.kv_cache[slots_T // size, slots_T % size] = steps_T.to(torch.int8)
        return steps_T
