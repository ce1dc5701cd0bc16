"""Text that is written token by token on a CPU against the layers' plain form, whatever the rows and adapters do."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tuner import adapted, config, tiny_llama
from torch import Tensor, nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from mote.routing import NO_STEP
from mote.tuner.layer import MoteLinear
from mote.tuner.writing import FEW, Writing

STEPS = [NO_STEP, 1, 2, 3]
MODEL = adapted()


def read(model: Any, rows: int, seed: int = 0) -> Any:
    """A cache that holds six tokens a row."""
    cache = DynamicCache(config=model.get_base_model().config)
    ids = torch.randint(3, 60, (rows, 6), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, step_ids=torch.ones_like(ids))
    return cache


def write(model: Any, cache: Any, steps: list[int], plainly: bool = False) -> Tensor:
    """The logits (B, V) of one more token a row; `plainly`: as where gradients are wanted, on a copy of the cache."""
    ids = torch.arange(10, 10 + len(steps))[:, None]
    cache = copy.deepcopy(cache) if plainly else cache
    with torch.set_grad_enabled(plainly):
        logits = model(input_ids=ids, past_key_values=cache, step_ids=torch.tensor(steps)[:, None]).logits[:, -1]
    found: Tensor = logits.detach()
    return found


def kept(model: Any, cache: Any) -> dict[Any, int]:
    """How many layers are kept of a text, by adapter and step."""
    return {key: len(part.now) for key, part in model.get_base_model().mote_router._texts.get(cache, {}).items()}


@given(st.lists(st.lists(st.sampled_from(STEPS), min_size=4, max_size=4), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_any_mixture_of_steps_and_base_rows_equals_the_plain_form(steps: list[list[int]]) -> None:
    cache = read(MODEL, 4)
    for now in steps:
        expected = write(MODEL, cache, now, plainly=True)
        torch.testing.assert_close(write(MODEL, cache, now), expected, atol=1e-5, rtol=1e-5)
        assert kept(MODEL, cache)["default", now[0] if len(set(now)) == 1 else None] == 14


@pytest.mark.parametrize("other", [NO_STEP, 2])
def test_rows_without_a_step_are_the_base_model_exactly(other: int) -> None:
    cache = read(MODEL, 4)
    found = write(MODEL, copy.deepcopy(cache), [NO_STEP, NO_STEP, NO_STEP, other])
    with MODEL.disable_adapter():
        expected = write(MODEL, cache, [NO_STEP] * 4)
    assert torch.equal(found[:3, :64], expected[:3, :64])  # the markers' rows behind them are trained


def test_a_plain_layer_is_computed_without_a_call_of_it_and_a_watched_one_with(monkeypatch: Any) -> None:
    model, calls, called, forward = adapted(), [], [], nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda layer, x: called.append(layer) or forward(layer, x))
    layers = [module for module in model.modules() if isinstance(module, MoteLinear)]
    layers[0].base_layer.register_forward_hook(lambda *_: calls.append("hook"))
    cache = read(model, 2)
    calls.clear()
    for layer in layers:
        layer.base_layer.__class__ = type("Linear", (nn.Linear,), {}) if layer is layers[1] else nn.Linear
    expected = write(model, cache, [1, 1], plainly=True)
    assert all(layer.base_layer in called for layer in layers)
    calls.clear()
    called.clear()
    torch.testing.assert_close(write(model, cache, [1, 1]), expected, atol=1e-5, rtol=1e-5)
    assert calls == ["hook"]
    assert [layer.base_layer in called for layer in layers] == [True, True] + [False] * 12


def gpt2() -> Any:
    """Layers of its own kind (Conv1D), with a bias, three of them fused into one."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3))


def with_biases() -> Any:
    base = tiny_llama()
    for module in base.modules():
        if isinstance(module, nn.Linear) and module is not base.lm_head:
            module.bias = nn.Parameter(torch.randn(module.out_features))
    return base


BASES: dict[str, Callable[[], Any]] = {
    "gpt2": gpt2, "biases": with_biases, "bfloat16": lambda: tiny_llama().to(torch.bfloat16),
}  # fmt: skip


@pytest.mark.parametrize("steps", [[2, 2, 2], [1, 3, NO_STEP]], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_other_bases(base: str, steps: list[int]) -> None:
    from peft import get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(BASES[base](), config(target_modules="all-linear")).eval()
    cache = read(model, 3)
    expected = write(model, cache, steps, plainly=True)
    tolerance = 0.15 if base == "bfloat16" else 1e-5
    torch.testing.assert_close(write(model, cache, steps), expected, atol=tolerance, rtol=tolerance)
    assert len(kept(model, cache)) == 1


def test_adapters_may_change_between_two_tokens() -> None:
    model = adapted()
    model.add_adapter("other", config(mix=1.0))
    cache, found = read(model, 2), []
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        expected = write(model, cache, [1, 2], plainly=True)
        found.append(write(model, copy.deepcopy(cache), [1, 2]))
        torch.testing.assert_close(found[-1], expected, atol=1e-5, rtol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-2
    write(model, cache, [1, 2])
    model.delete_adapter("other")
    assert not kept(model, cache)
    expected = write(model, cache, [1, 1], plainly=True)
    torch.testing.assert_close(write(model, cache, [1, 1]), expected, atol=1e-5, rtol=1e-5)
    base = model.unload()
    assert not any(isinstance(module, MoteLinear) for module in base.modules())


def test_two_active_adapters_go_the_plain_way() -> None:
    model = adapted()
    model.add_adapter("other", config(mix=1.0, markers={}))
    model.base_model.set_adapter(["default", "other"])
    cache = read(model, 2)
    expected = write(model, cache, [1, 1], plainly=True)
    torch.testing.assert_close(write(model, cache, [1, 1]), expected, atol=1e-5, rtol=1e-5)
    assert not kept(model, cache)


def passes(model: Any, **call: Any) -> Writing | None:
    """What the layers are told of a pass."""
    router, seen = model.get_base_model().mote_router, []
    layer = next(module for module in model.modules() if isinstance(module, MoteLinear))
    handle = layer.register_forward_pre_hook(lambda *_: seen.append(router.writing()))
    with torch.no_grad():
        model(**call)
    handle.remove()
    found: Writing | None = seen[0]
    return found


def test_a_line_of_tokens_of_different_rows_writes_and_a_stretch_of_one_reads() -> None:
    """As the running batch has them: a token a row, with and without a stretch of a prompt behind."""
    steps = torch.tensor([[1, 2, 3, 3]])
    for documents, writes in (([0, 1, 2, 3], True), ([0, 1, 2, 2], False), (None, False)):
        call = {} if documents is None else {"document_ids": torch.tensor([documents])}
        cache = DynamicCache(config=MODEL.get_base_model().config)
        ids = torch.tensor([[5, 6, 7, 8]])
        assert (passes(MODEL, input_ids=ids, step_ids=steps, past_key_values=cache, **call) is not None) == writes


@pytest.mark.parametrize("what", ["training", "many rows", "autocast", "question"])
def test_other_passes_go_the_plain_way(what: str) -> None:
    model = adapted().train(what == "training")
    rows = FEW + 1 if what == "many rows" else 2
    ids, steps = torch.full((rows, 1), 5), torch.full((rows, 1), 0 if what == "question" else 1)
    cache = DynamicCache(config=model.get_base_model().config)
    with torch.autocast("cpu", enabled=what == "autocast"):
        assert passes(model, input_ids=ids, step_ids=steps, past_key_values=cache) is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_next_text_of_a_cache_sees_new_weights_in_the_same_memory(mode: Any) -> None:
    model, places = adapted(), []
    layer = next(module for module in model.modules() if isinstance(module, MoteLinear))
    cache = DynamicCache(config=model.get_base_model().config)
    for turn in range(3):
        with torch.no_grad():
            layer.mote_A["default"].weight += turn
        ids = torch.tensor([[5, 6, 7]])
        with mode() if turn else torch.inference_mode():
            model(input_ids=ids, past_key_values=cache, step_ids=torch.ones_like(ids))
            before = copy.deepcopy(cache)
            call = {"input_ids": ids[:, :1], "step_ids": torch.ones(1, 1, dtype=torch.long)}
            found = model(past_key_values=cache, **call).logits
        (part,) = model.get_base_model().mote_router._texts[cache].values()
        places.append(part.memory[layer][0].data_ptr())
        torch.testing.assert_close(found, model(past_key_values=before, **call).logits, atol=1e-5, rtol=1e-5)
    assert len(set(places)) == 1
