"""Models that the continuous batch cannot run are refused when they are loaded, and no request holds its thread."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    GraniteMoeHybridConfig,
    Lfm2Config,
    LlamaConfig,
)

from mote.core.errors import UserError
from mote.inference.batching import Batcher
from mote.inference.grammar import FreeText
from mote.inference.request import Request

SMALL = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3,
}  # fmt: skip
UNSUPPORTED: dict[str, Callable[[], Any]] = {
    "Lfm2": lambda: Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
    "GraniteMoeHybrid": lambda: GraniteMoeHybridConfig(
        **SMALL, layer_types=["mamba", "attention"], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8,
        num_local_experts=0, shared_intermediate_size=32, mamba_expand=2, mamba_n_groups=1,
    ),
    "DeepseekV3": lambda: DeepseekV3Config(
        **SMALL | {"num_key_value_heads": 4}, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=12, first_k_dense_replace=2,
    ),
    "GptOss": lambda: GptOssConfig(**SMALL, head_dim=8, num_local_experts=2, num_experts_per_tok=1),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_model_is_refused_with_its_name(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(UNSUPPORTED[name]()).eval()
    with pytest.raises(UserError, match=f"{name}ForCausalLM cannot run in the continuous batch .*--engine") as error:
        Batcher(model, 2)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)).eval()


def test_prompt_without_tokens_is_refused_at_once() -> None:
    with pytest.raises(UserError, match="prompt: it has no tokens"):
        Request([], FreeText(()), 5)


@pytest.mark.parametrize("limit", [-3, 0, 1])
def test_request_without_budget_ends(model: Any, limit: int) -> None:
    batcher = Batcher(model, 1)
    request = Request([1, 2], FreeText(()), limit)
    assert len(batcher.submit(request).result(60)) == 1
    batcher.wait()


def test_request_that_follows_without_tokens_is_refused(model: Any) -> None:
    batcher = Batcher(model, 1)
    first = Request([1, 2], FreeText(()), 2, follow=lambda ids: Request([], FreeText(()), 5))
    with pytest.raises(UserError, match="prompt: it has no tokens"):
        batcher.submit(first).result(60)
    assert len(batcher.submit(Request([1, 2], FreeText(()), 2)).result(60)) == 2
