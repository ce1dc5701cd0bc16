"""Rotary embeddings whose frequencies depend on the length: no sequence of a batch changes another one."""

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from mote.inference import batching
from mote.inference.batching import Batcher
from mote.inference.grammar import FreeText
from mote.inference.request import Request

VOCAB = 60
ORIGINAL = 32  # length up to which the frequencies are the original ones
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


def longrope(original: int = ORIGINAL) -> Any:
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0], "original_max_position_embeddings": original,
    }  # fmt: skip
    config = Phi3Config(
        **SMALL, rope_parameters=rope, max_position_embeddings=2048, original_max_position_embeddings=original
    )
    return Phi3ForCausalLM(config)


def dynamic() -> Any:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters=rope, max_position_embeddings=ORIGINAL))


MODELS = {"longrope": longrope, "dynamic": dynamic}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def prompt(length: int) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def alone(model: Any, request: Request) -> list[int]:
    """The same text from a model that has seen no other sequence.

    Without a cache for `longrope`: at its switch `generate` drops the cache but not the ids that it has already cut.
    """
    model = copy.deepcopy(model)
    if isinstance(model, Phi3ForCausalLM):
        text = list(request.ids)
        with torch.no_grad():
            for _ in range(request.limit):
                text.append(int(model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
        return text[len(request.ids) :]
    ids = torch.tensor([list(request.ids)])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.limit, do_sample=False
    )
    generated: list[int] = out[0, ids.shape[1] :].tolist()
    return generated


def requests(*lengths: int, limit: int = 10, shared: int = 0) -> list[Request]:
    return [Request(prompt(length), FreeText(()), limit, shared) for length in lengths]


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("chunk", [7, 512])
def test_sequences_of_all_lengths_equal_single_ones(
    model: Any, monkeypatch: pytest.MonkeyPatch, slots: int, chunk: int
) -> None:
    monkeypatch.setattr(batching, "_CHUNK_TOKENS", chunk)
    expected = [alone(model, request) for request in requests(19, 56, 28, 31, 32, 33, 5, 90)]
    batcher = Batcher(model, slots)
    futures = [batcher.submit(request) for request in requests(19, 56, 28, 31, 32, 33, 5, 90)]
    assert [future.result(60) for future in futures] == expected


def test_shared_prefixes_stay_in_one_regime(model: Any) -> None:
    asked = []
    for length in (24, 60, 29, 50):
        ids = [*prompt(20), *prompt(length)[20:]]
        asked.append(Request(ids, FreeText(()), 12, shared=20))
    expected = [alone(model, request) for request in asked]
    batcher = Batcher(model, 2)
    assert [future.result(60) for future in [batcher.submit(request) for request in asked]] == expected


def test_request_that_follows_past_the_original_length(model: Any) -> None:
    [first, behind] = requests(26, 26, limit=4)
    behind.ids = [*first.ids, *prompt(12)]
    expected = [alone(model, first), alone(model, behind)]
    found: list[Any] = []
    first.follow = lambda ids: found.append(ids) or behind  # type: ignore[func-returns-value]
    found.append(Batcher(model, 2).submit(first).result(60))
    assert found == expected


def test_long_prompt_in_chunks_equals_the_whole_one() -> None:
    torch.manual_seed(0)
    model = longrope(600).eval()
    [request] = requests(700)
    assert Batcher(model, 2).submit(request).result(60) == alone(model, request)
