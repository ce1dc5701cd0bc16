"""A request without tokens is refused at once; one without a budget ends, and none holds the batch's thread."""

from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from mote.core.errors import UserError
from mote.inference.batching import Batcher
from mote.inference.grammar import FreeText
from mote.inference.request import Request

SMALL = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3,
}  # fmt: skip


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
