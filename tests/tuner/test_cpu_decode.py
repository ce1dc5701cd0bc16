"""The CPU decoding fast path against the layers' plain form, whatever rows and adapters do."""

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

from mote.tokens.routing import NO_STEP, QUESTION
from mote.tuner.cpu_decode import MAX_TOKENS, DecodeStep, _checksum
from mote.tuner.layer import MoteLinear

STEPS = [NO_STEP, QUESTION, 1, 2, 3]
MODEL = adapted()


def prefill(model: Any, rows: int, seed: int = 0) -> Any:
    """A cache that holds six tokens a row."""
    cache = DynamicCache(config=model.get_base_model().config)
    ids = torch.randint(3, 60, (rows, 6), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, step_ids=torch.ones_like(ids))
    return cache


def decode(model: Any, cache: Any, steps: list[int], plainly: bool = False) -> Tensor:
    """Logits (B, V) of one more token a row; `plainly`: with gradients, on a copy of the cache."""
    ids = torch.arange(10, 10 + len(steps))[:, None]
    cache = copy.deepcopy(cache) if plainly else cache
    with torch.set_grad_enabled(plainly):
        logits = model(input_ids=ids, past_key_values=cache, step_ids=torch.tensor(steps)[:, None]).logits[:, -1]
    found: Tensor = logits.detach()
    return found


def bound(model: Any) -> list[tuple[str, int | None, dict[Any, Any]]]:
    """Adapter, step and layers of everything that is bound."""
    return [
        (adapter, step, dict(functions))
        for (adapter, _), layers in model.get_base_model().mote_router._cpu_decoder._bound.items()
        for (step, _), functions in layers.functions.items()
    ]


def bound_layers(model: Any) -> dict[Any, int]:
    """How many layers are bound, by adapter and step."""
    return {(adapter, step): len(functions) for adapter, step, functions in bound(model)}


@given(st.lists(st.lists(st.sampled_from(STEPS), min_size=4, max_size=4), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_any_mix_of_steps_and_base_rows_equals_the_plain_form(steps: list[list[int]]) -> None:
    cache = prefill(MODEL, 4)
    for now in steps:
        expected = decode(MODEL, cache, now, plainly=True)
        torch.testing.assert_close(decode(MODEL, cache, now), expected, atol=1e-5, rtol=1e-5)
        assert bound_layers(MODEL)["default", now[0] if len(set(now)) == 1 and now[0] else None] == 14


@pytest.mark.parametrize("other", [NO_STEP, 2])
def test_rows_without_a_step_are_the_base_model_exactly(other: int) -> None:
    cache = prefill(MODEL, 4)
    found = decode(MODEL, copy.deepcopy(cache), [NO_STEP, NO_STEP, NO_STEP, other])
    with MODEL.disable_adapter():
        expected = decode(MODEL, cache, [NO_STEP] * 4)
    assert torch.equal(found[:3, :64], expected[:3, :64])  # the markers' rows behind them are trained


def test_only_layers_with_hooks_or_subclasses_are_called(monkeypatch: Any) -> None:
    model = adapted()
    calls: list[str] = []
    called: list[nn.Module] = []
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda layer, x: called.append(layer) or forward(layer, x))
    layers = [module for module in model.modules() if isinstance(module, MoteLinear)]
    layers[0].base_layer.register_forward_hook(lambda *_: calls.append("hook"))
    cache = prefill(model, 2)
    calls.clear()
    for layer in layers:
        layer.base_layer.__class__ = type("Linear", (nn.Linear,), {}) if layer is layers[1] else nn.Linear
    expected = decode(model, cache, [1, 1], plainly=True)
    assert all(layer.base_layer in called for layer in layers)
    calls.clear()
    called.clear()
    torch.testing.assert_close(decode(model, cache, [1, 1]), expected, atol=1e-5, rtol=1e-5)
    assert calls == ["hook"]
    assert [layer.base_layer in called for layer in layers] == [True, True] + [False] * 12


def gpt2() -> Any:
    """Conv1D layers with biases, queries, keys and values in one."""
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
    cache = prefill(model, 3)
    expected = decode(model, cache, steps, plainly=True)
    tolerance = 0.15 if base == "bfloat16" else 1e-5
    torch.testing.assert_close(decode(model, cache, steps), expected, atol=tolerance, rtol=tolerance)
    assert len(bound_layers(model)) == 1


def test_adapters_may_change_between_two_tokens() -> None:
    model = adapted()
    model.add_adapter("other", config(mix=1.0))
    cache = prefill(model, 2)
    found: list[Tensor] = []
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        expected = decode(model, cache, [1, 2], plainly=True)
        found.append(decode(model, copy.deepcopy(cache), [1, 2]))
        torch.testing.assert_close(found[-1], expected, atol=1e-5, rtol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-2
    decode(model, cache, [1, 2])
    model.delete_adapter("other")
    assert not bound_layers(model)
    expected = decode(model, cache, [1, 1], plainly=True)
    torch.testing.assert_close(decode(model, cache, [1, 1]), expected, atol=1e-5, rtol=1e-5)
    base = model.unload()
    assert not any(isinstance(module, MoteLinear) for module in base.modules())


def test_two_active_adapters_take_the_plain_form() -> None:
    model = adapted()
    model.add_adapter("other", config(mix=1.0, markers={}))
    model.base_model.set_adapter(["default", "other"])
    cache = prefill(model, 2)
    expected = decode(model, cache, [1, 1], plainly=True)
    torch.testing.assert_close(decode(model, cache, [1, 1]), expected, atol=1e-5, rtol=1e-5)
    assert not bound_layers(model)


def decode_step(model: Any, **call: Any) -> DecodeStep | None:
    """What the layers read of a forward pass."""
    router = model.get_base_model().mote_router
    seen: list[DecodeStep | None] = []
    layer = next(module for module in model.modules() if isinstance(module, MoteLinear))
    handle = layer.register_forward_pre_hook(lambda *_: seen.append(router.decode_step()))
    with torch.no_grad():
        model(**call)
    handle.remove()
    return seen[0]


def test_one_token_per_document_is_a_decode_step() -> None:
    """As in continuous batching: one token per sequence, with and without a prefill chunk behind."""
    steps = torch.tensor([[1, 2, 3, 3]])
    for documents, decodes in (([0, 1, 2, 3], True), ([0, 1, 2, 2], False), (None, False)):
        call = {} if documents is None else {"document_ids": torch.tensor([documents])}
        cache = DynamicCache(config=MODEL.get_base_model().config)
        ids = torch.tensor([[5, 6, 7, 8]])
        assert (decode_step(MODEL, input_ids=ids, step_ids=steps, past_key_values=cache, **call) is not None) == decodes


@pytest.mark.parametrize("what", ["training", "many rows", "autocast"])
def test_other_passes_take_the_plain_form(what: str) -> None:
    model = adapted().train(what == "training")
    rows = MAX_TOKENS + 1 if what == "many rows" else 2
    ids = torch.full((rows, 1), 5)
    steps = torch.ones(rows, 1, dtype=torch.long)
    cache = DynamicCache(config=model.get_base_model().config)
    with torch.autocast("cpu", enabled=what == "autocast"):
        assert decode_step(model, input_ids=ids, step_ids=steps, past_key_values=cache) is None


def replace_base(layer: MoteLinear) -> None:
    layer.base_layer = copy.deepcopy(layer.base_layer)
    layer.base_layer.weight.data.neg_()


CHANGES: dict[str, Callable[[MoteLinear], Any]] = {
    "counted": lambda layer: layer.mote_A["default"].weight.add_(1),
    "a row of A, not counted": lambda layer: layer.mote_A["default"].weight.data[5].add_(1),
    "a column of A, not counted": lambda layer: layer.mote_A["default"].weight.data[:, 5].add_(1),
    "a row of B, not counted": lambda layer: layer.mote_B["default"].weight.data[5].add_(1),
    "a column of B, not counted": lambda layer: layer.mote_B["default"].weight.data[:, 1].add_(1),
    "one element of B, not counted": lambda layer: layer.mote_B["default"].weight.data[3, 2].add_(1),
    "experts exchanged, not counted": lambda layer: layer.mote_A["default"].weight.data.copy_(
        layer.mote_A["default"].weight.data.roll(4, 0)
    ),
    "other memory": lambda layer: setattr(layer.mote_B["default"].weight, "data", torch.ones(32, 16)),
    "another weight": lambda layer: setattr(layer.mote_A["default"], "weight", nn.Parameter(torch.ones(16, 32))),
    "the base layer's weight": lambda layer: layer.base_layer.weight.data.neg_(),
    "the base layer's memory": lambda layer: setattr(layer.base_layer.weight, "data", torch.ones(32, 32)),
    "a bias": lambda layer: setattr(layer.base_layer, "bias", nn.Parameter(torch.ones(32))),
    "a hook": lambda layer: layer.base_layer.register_forward_hook(lambda *given: 2 * given[-1]),
    "another base layer": replace_base,
}


@pytest.mark.parametrize("same_cache", [True, False], ids=["the same cache", "a new cache"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("how", CHANGES)
def test_the_next_sequence_sees_changed_weights(how: str, mode: Any, same_cache: bool) -> None:
    model = adapted()
    found: list[Tensor] = []
    layer = next(module for module in model.modules() if isinstance(module, MoteLinear))
    cache = DynamicCache(config=model.get_base_model().config)
    ids = torch.tensor([[5, 6, 7]])
    call = {"input_ids": ids[:, :1], "step_ids": torch.ones(1, 1, dtype=torch.long)}
    for turn in range(3):
        if turn == 1:
            with torch.no_grad():
                CHANGES[how](layer)
        if not same_cache:
            cache = DynamicCache(config=model.get_base_model().config)
        with mode() if turn else torch.inference_mode():
            model(input_ids=ids, past_key_values=cache, step_ids=torch.ones_like(ids))
            if turn == 1:
                before = copy.deepcopy(cache)
            else:
                cache.crop(len(ids[0]) - cache.get_seq_length())
            found.append(model(past_key_values=cache, **call).logits)
    expected = model(past_key_values=before, **call).logits
    torch.testing.assert_close(found[1], expected, atol=1e-5, rtol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3
    assert bound_layers(model) == {("default", 1): 14}


@pytest.mark.parametrize("steps", [[1, 1], [1, 2], [0, 0], [NO_STEP, NO_STEP]], ids=str)
@pytest.mark.parametrize("same_cache", [True, False], ids=["the same cache", "a new cache"])
def test_bound_layers_serve_the_next_sequence_if_unchanged(steps: list[int], same_cache: bool) -> None:
    model = adapted()
    cache = prefill(model, 2)
    decode(model, cache, steps)
    before = bound(model)
    if not same_cache:
        cache = prefill(model, 2, seed=1)
    more = torch.tensor([[5, 6, 7]] * 2)
    with torch.no_grad():
        model(input_ids=more, past_key_values=cache, step_ids=torch.ones_like(more))
    expected = decode(model, cache, steps, plainly=True)
    torch.testing.assert_close(decode(model, cache, steps), expected, atol=1e-5, rtol=1e-5)
    assert before and bound(model) == before


def test_a_training_step_frees_the_bound_layers() -> None:
    model = adapted()
    decode(model, prefill(model, 2), [1, 1])
    assert bound(model)
    model.train()(input_ids=torch.tensor([[5, 6, 7]]))
    assert not bound(model)


def test_a_model_made_under_inference_mode_decodes() -> None:
    ids = torch.tensor([[5, 6, 7, 10]])
    steps = torch.ones_like(ids)
    with torch.inference_mode():
        model = adapted()
        cache = DynamicCache(config=model.get_base_model().config)
        expected = model(input_ids=ids, step_ids=steps).logits[:, -1:]
        for read_before in (0, 1):
            cache.crop(read_before - cache.get_seq_length())
            prompt = slice(read_before, 3)
            model(input_ids=ids[:, prompt], step_ids=steps[:, prompt], past_key_values=cache)
            found = model(input_ids=ids[:, -1:], step_ids=steps[:, -1:], past_key_values=cache).logits
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            assert bound_layers(model) == {("default", 1): 14}


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1e-4, 1e-2, -1.0]), st.data())
@settings(deadline=None)
def test_the_checksum_sees_a_change_of_any_element(rows: int, columns: int, change: float, data: Any) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    before = _checksum(weight)
    assert torch.equal(_checksum(weight), before)
    weight[data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))] += change
    assert not torch.equal(_checksum(weight), before)
