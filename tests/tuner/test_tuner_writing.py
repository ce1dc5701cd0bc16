"""Text that is written token by token on a CPU against the layers' plain form, whatever the rows and adapters do."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adapters import adapted, config, tiny_llama
from torch import Tensor, nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from mote.tokens.routing import NO_STEP
from mote.tuner.cpu_decode import FEW, Writing, _places
from mote.tuner.layer import MoteLinear

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
    texts = model.get_base_model().mote_router._texts.get(cache, {})
    return {(key[0], step): len(writes) for key, part in texts.items() for (step, _), writes in part.writes.items()}


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


def replace_base(layer: MoteLinear) -> None:
    layer.base_layer = copy.deepcopy(layer.base_layer)
    layer.base_layer.weight.data.neg_()


CHANGES: dict[str, Callable[[MoteLinear], Any]] = {
    "counted": lambda layer: layer.mote_A["default"].weight.add_(1),
    "a row of A, not counted": lambda layer: layer.mote_A["default"].weight.data[5].add_(1),
    "a column of A, not counted": lambda layer: layer.mote_A["default"].weight.data[:, 5].add_(1),
    "a row of B, not counted": lambda layer: layer.mote_B["default"].weight.data[5].add_(1),
    "a column of B, not counted": lambda layer: layer.mote_B["default"].weight.data[:, 1].add_(1),
    "other memory": lambda layer: setattr(layer.mote_B["default"].weight, "data", torch.ones(32, 16)),
    "another weight": lambda layer: setattr(layer.mote_A["default"], "weight", nn.Parameter(torch.ones(16, 32))),
    "the base layer's weight": lambda layer: layer.base_layer.weight.data.neg_(),
    "the base layer's memory": lambda layer: setattr(layer.base_layer.weight, "data", torch.ones(32, 32)),
    "a bias": lambda layer: setattr(layer.base_layer, "bias", nn.Parameter(torch.ones(32))),
    "a hook": lambda layer: layer.base_layer.register_forward_hook(lambda *given: 2 * given[-1]),
    "another base layer": replace_base,
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("how", CHANGES)
def test_the_next_text_of_a_cache_sees_what_has_changed(how: str, mode: Any) -> None:
    model, found = adapted(), []
    layer = next(module for module in model.modules() if isinstance(module, MoteLinear))
    cache, ids = DynamicCache(config=model.get_base_model().config), torch.tensor([[5, 6, 7]])
    call = {"input_ids": ids[:, :1], "step_ids": torch.ones(1, 1, dtype=torch.long)}
    for turn in range(3):
        if turn == 1:
            with torch.no_grad():
                CHANGES[how](layer)
        with mode() if turn else torch.inference_mode():
            model(input_ids=ids, past_key_values=cache, step_ids=torch.ones_like(ids))
            if turn == 1:
                before = copy.deepcopy(cache)
            else:
                cache.crop(len(ids[0]))
            found.append(model(past_key_values=cache, **call).logits)
    expected = model(past_key_values=before, **call).logits
    torch.testing.assert_close(found[1], expected, atol=1e-5, rtol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3
    assert kept(model, cache) == {("default", 1): 14}


@pytest.mark.parametrize("steps", [[1, 1], [1, 2], [NO_STEP, NO_STEP]], ids=str)
def test_what_was_looked_up_serves_the_next_text_while_nothing_has_changed(steps: list[int]) -> None:
    model = adapted()
    cache = read(model, 2)
    write(model, cache, steps)
    texts = model.get_base_model().mote_router._texts[cache]
    looked_up = [dict(writes) for kept in texts.values() for writes in kept.writes.values()]
    more = torch.tensor([[5, 6, 7]] * 2)
    with torch.no_grad():
        model(input_ids=more, past_key_values=cache, step_ids=torch.ones_like(more))
    expected = write(model, cache, steps, plainly=True)
    torch.testing.assert_close(write(model, cache, steps), expected, atol=1e-5, rtol=1e-5)
    assert [dict(writes) for kept in texts.values() for writes in kept.writes.values()] == looked_up


def test_a_model_made_under_inference_mode_writes() -> None:
    ids = torch.tensor([[5, 6, 7, 10]])
    steps = torch.ones_like(ids)
    with torch.inference_mode():
        model = adapted()
        cache = DynamicCache(config=model.get_base_model().config)
        expected = model(input_ids=ids, step_ids=steps).logits[:, -1:]
        for read_before in (0, 1):
            cache.crop(read_before)
            prompt = slice(read_before, 3)
            model(input_ids=ids[:, prompt], step_ids=steps[:, prompt], past_key_values=cache)
            found = model(input_ids=ids[:, -1:], step_ids=steps[:, -1:], past_key_values=cache).logits
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            assert kept(model, cache) == {("default", 1): 14}


@given(st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_the_places_that_are_looked_at_are_in_all_rows_and_columns(rows: int, columns: int, turned: bool) -> None:
    numbers = torch.arange(rows * columns).view(rows, columns)
    places = _places(numbers.t().contiguous().t() if turned else numbers)
    assert set((places // columns).tolist()) == set(range(rows))
    assert set((places % columns).tolist()) == set(range(columns))
