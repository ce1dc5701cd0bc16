"""Running batches of models with sliding windows or chunks against greedy full forward passes."""

from typing import Any

import pytest
import torch
from support.windows import BASES, REACH, VOCAB, plain_logits, tiny_base

from mote.inference import batching
from mote.inference.batching import Batcher
from mote.inference.grammar import FreeText
from mote.inference.request import Request

BATCHED = sorted(set(BASES) - {"doge"})  # its attention adds a bias of its own to each key


def random_ids(length: int, seed: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def requests() -> list[Request]:
    """Prompts shorter and longer than a window, alone or behind a shared beginning, that end in all places of one."""
    begins = [[], random_ids(2 * REACH + 3, 100)]
    made = []
    for i in range(6):
        begin = begins[i % 2]
        made.append(Request(begin + random_ids(2 + 3 * i, i), FreeText(()), 8 + i, len(begin)))
    return made


def greedy(model: Any, request: Request) -> list[int]:
    """The same text by uncached forward passes under eager attention."""
    ids = list(request.ids)
    for _ in range(request.limit):
        ids.append(int(plain_logits(model, ids)[-1].argmax()))
    return ids[len(request.ids) :]


def answers(model: Any, slots: int) -> list[list[int]]:
    running = Batcher(model, slots)
    found = [future.result(60) for future in [running.submit(request) for request in requests()]]
    running.wait()
    return found


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("name", BATCHED)
def test_answers_equal_greedy_full_forward_passes(name: str, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_CHUNK_TOKENS", 5)
    model = tiny_base(name)
    found = answers(model, slots)
    assert found == [greedy(model, request) for request in requests()]
    assert len({token for ids in found for token in ids}) > 5


@pytest.mark.parametrize("slots", [1, 4])
def test_llama_4_scales_by_position_in_the_sequence(slots: int) -> None:
    """It adds the cache's length to a token's index in the forward pass, where sequences lie side by side."""
    model = tiny_base("llama4", floor_scale=4, attn_scale=3.0)
    assert answers(model, slots) == [greedy(model, request) for request in requests()]
    plain = tiny_base("llama4", floor_scale=10**6, attn_scale=3.0)
    assert answers(plain, slots) != answers(model, slots)


def test_windows_that_differ_from_the_configuration_are_refused() -> None:
    model = tiny_base("gemma3", use_cache=False)
    model.model.layers[0].self_attn.sliding_window = REACH + 1
    with pytest.raises(RuntimeError, match=f"layer 0 has the window {REACH + 1}, its configuration says"):
        Batcher(model, 1).submit(Request([1, 2], FreeText(()), 2)).result(60)
