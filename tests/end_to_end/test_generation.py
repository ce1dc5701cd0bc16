"""Writing with a cache gives what writing without one gives, whoever switches when, and computes no token twice."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.adapters import adapted, config, some_ids, tiny_llama
from support.threads import in_threads
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, StaticCache, set_seed

from mote.tokens.routing import step_ids
from mote.tuner.layer import MoteLinear

START = {"analysis": 64, "guidance": 66, "response": 68}
NEW = 12


class Switches(LogitsProcessor):
    """Makes each row generate start markers at different offsets."""

    def __init__(self, prompt: int, beams: int = 1) -> None:
        self.plan = {  # row -> number of the new token -> marker
            0: {1: 64, 4: 66, 9: 68},
            1: {2: 68, 3: 2},
            2: {0: 66, 1: 66, 7: 64},
        }
        self.prompt, self.beams = prompt, beams

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for row in range(scores.shape[0]):
            marker = self.plan[row // self.beams].get(input_ids.shape[1] - self.prompt)
            if marker is not None:
                scores[row] = -torch.inf
                scores[row, marker] = 0
        return scores


def switching(ids: Tensor, beams: int = 1) -> LogitsProcessorList:
    return LogitsProcessorList([Switches(ids.shape[1], beams)])


@contextmanager
def tokens_computed(model: Any) -> Iterator[list[int]]:
    """The number of tokens a row in every pass through the first block."""
    counted: list[int] = []
    block = model.get_base_model().model.layers[0]
    handle = block.register_forward_pre_hook(lambda _, args: counted.append(args[0].shape[1]))
    try:
        yield counted
    finally:
        handle.remove()


def other_llama() -> Any:
    """A model of the same vocabulary that guesses what the adapted one writes, rightly or not."""
    torch.manual_seed(7)
    return tiny_llama(vocab=70)


HOW: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "beams": {"num_beams": 3},
    "sampling beams": {"num_beams": 2, "do_sample": True},
    "static cache": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("padded", [False, True], ids=["", "left-padded"])
@pytest.mark.parametrize("how", HOW)
def test_cached_equals_uncached_with_different_step_switches(how: str, padded: bool) -> None:
    model = adapted()
    ids = some_ids(length=18)
    mask = torch.ones_like(ids)
    if padded:
        ids[1, :4] = mask[1, :4] = ids[2, :7] = mask[2, :7] = 0
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, **HOW[how]}
    given["logits_processor"] = switching(ids, given.get("num_beams", 1))
    set_seed(0)
    with tokens_computed(model) as counted:
        cached = model.generate(**given)
    assert sum(counted) == cached.shape[1] - 1  # the last one is never read
    set_seed(0)
    uncached = model.generate(**{**given, "use_cache": False, "cache_implementation": None})
    assert torch.equal(cached, uncached)
    new = cached[:, ids.shape[1] :]
    assert [new[0, 1], new[0, 4], new[1, 2], new[2, 0], new[2, 1]] == [64, 66, 68, 66, 66]
    steps = step_ids(cached, model.peft_config["default"].routing)[:, -NEW:]
    assert any(len(set(column)) == 3 for column in steps.t().tolist())


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampling"])
@pytest.mark.parametrize("guess", ["assistant", "lookup"])
def test_assisted_generation_equals_uncached(guess: str, sampled: bool) -> None:
    model = adapted()
    ids = some_ids()[:1]
    given = {"input_ids": ids, "max_new_tokens": NEW, "do_sample": False, "logits_processor": switching(ids)}
    how = {"assistant_model": other_llama()} if guess == "assistant" else {"prompt_lookup_num_tokens": 3}
    expected = model.generate(**given, use_cache=False)
    if sampled:  # the guesses are sampled separately, so only the support of the distribution is fixed
        how |= {"do_sample": True, "top_k": 1}
    with tokens_computed(model) as counted:
        assert torch.equal(model.generate(**{**given, **how}), expected)
    assert max(counted[1:]) > 1  # guesses were checked together


def test_adapted_model_as_assistant() -> None:
    model = other_llama()
    ids = some_ids()[:1]
    given = {"input_ids": ids, "max_new_tokens": NEW, "do_sample": False, "logits_processor": switching(ids)}
    assert torch.equal(model.generate(**given, assistant_model=adapted()), model.generate(**given, use_cache=False))


def test_each_new_token_uses_its_steps_expert() -> None:
    """The logits of every token that was written, against one pass over the whole text."""
    model = adapted()
    ids = some_ids()
    out = model.generate(
        input_ids=ids, max_new_tokens=NEW, do_sample=False, logits_processor=switching(ids),
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    whole = model(input_ids=out.sequences).logits[:, ids.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, dim=1), whole, atol=1e-5, rtol=1e-5)
    question = model(input_ids=out.sequences, step_ids=torch.zeros_like(out.sequences)).logits
    assert (question[:, ids.shape[1] - 1 : -1] - whole).abs().max() > 0.1


# --- going on from a cache


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("more", [[], [67, 2, 30, 31], [66, 20]], ids=["alone", "next turn", "in a step"])
def test_generate_continues_from_anothers_cache(more: list[int], kind: type) -> None:
    model = adapted()
    ids = some_ids()
    config = model.get_base_model().config
    cache = kind(config=config) if kind is DynamicCache else kind(config=config, max_cache_len=64)
    first = model.generate(
        input_ids=ids, max_new_tokens=6, do_sample=False, logits_processor=switching(ids), past_key_values=cache
    )
    text = torch.cat([first, torch.tensor([more] * 3, dtype=torch.long)], dim=1)
    given = {"input_ids": text, "max_new_tokens": NEW, "do_sample": False, "logits_processor": switching(text)}
    with tokens_computed(model) as counted:
        cached = model.generate(**given, past_key_values=cache)
    assert counted[0] == 1 + len(more) and sum(counted) == cached.shape[1] - first.shape[1]
    assert torch.equal(cached, model.generate(**given, use_cache=False))


def test_generate_continues_with_the_new_tokens_alone() -> None:
    model = adapted()
    ids = some_ids()
    out = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    cache = out.past_key_values
    new = torch.full((3, 2), 5)
    text = torch.cat([out.sequences[:, : cache.get_seq_length()], new], dim=1)
    given = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(input_ids=text, use_cache=False, **given)[:, text.shape[1] :]
    found = model.generate(input_ids=new, attention_mask=torch.ones_like(text), past_key_values=cache, **given)
    assert torch.equal(found[:, 2:], expected)


def test_prompt_can_be_prefilled_in_chunks() -> None:
    model = adapted()
    ids = some_ids()
    given = {"input_ids": ids, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**given, prefill_chunk_size=8), model.generate(**given, use_cache=False))


@pytest.mark.parametrize("how", ["cache alone", "context_ids", "step_ids"])
@pytest.mark.parametrize("grad", [False, True])
def test_custom_decoding_loop_equals_uncached(how: str, grad: bool) -> None:
    model = adapted()
    ids = some_ids()
    routing = model.peft_config["default"].routing
    expected = model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False, use_cache=False)
    with torch.set_grad_enabled(grad):
        out = model(input_ids=ids, use_cache=True)
        for _ in range(NEW - 1):
            ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], dim=1)
            known = {"context_ids": ids, "step_ids": step_ids(ids, routing)[:, -1:]}
            given = {how: known[how]} if how in known else {}
            out = model(input_ids=ids[:, -1:], past_key_values=out.past_key_values, **given)
    assert torch.equal(torch.cat([ids, out.logits[:, -1:].argmax(-1)], dim=1), expected)


CACHE_CHANGES: dict[str, Callable[[Any], Any]] = {
    "cropped": lambda cache: cache.crop(-2),
    "reordered": lambda cache: cache.reorder_cache(torch.tensor([2, 1, 0])),
    "one row": lambda cache: cache.batch_select_indices(torch.tensor([0])),
    "copied": copy.deepcopy,
}


@pytest.mark.parametrize("change", CACHE_CHANGES)
def test_loop_over_a_changed_cache_is_refused(change: str) -> None:
    model = adapted()
    ids = some_ids()
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    cache = CACHE_CHANGES[change](cache) or cache
    ids = ids[: len(cache.layers[0].keys), -1:]
    with pytest.raises(RuntimeError, match="changed or filled elsewhere add `context_ids=ids`"):
        model(input_ids=ids, past_key_values=cache)


def test_chunks_after_a_cache_continue_its_last_steps() -> None:
    """Chunks of several tokens, with markers and without, and adapters that take turns."""
    model = adapted()
    ids = some_ids()
    expected = model(input_ids=ids).logits
    cache = DynamicCache(config=model.get_base_model().config)
    found = [model(input_ids=part, past_key_values=cache).logits for part in ids.split([5, 4, 1, ids.shape[1] - 10], 1)]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-4, rtol=1e-4)
    model.add_adapter("other", config())
    model.set_adapter("other")
    with pytest.raises(RuntimeError, match="step of each token is unknown"):
        model(input_ids=ids[:, -1:], past_key_values=cache)


def test_loop_over_an_unknown_cache_is_refused() -> None:
    model = adapted()
    ids = some_ids()
    cache = StaticCache(config=model.get_base_model().config, max_cache_len=64)
    model(input_ids=ids, past_key_values=cache)
    with pytest.raises(RuntimeError, match="add `context_ids=ids`, all ids of the rows so far"):
        model(input_ids=ids[:, -1:], past_key_values=cache)
    base = model.get_base_model()
    assert torch.equal(base(ids).logits, model(input_ids=ids).logits)  # arguments may come without their names
    with pytest.raises(RuntimeError, match="step of each token is unknown"):
        base(ids[:, -1:], None, None, cache)
    with pytest.raises(ValueError, match="context_ids of shape"):
        model(input_ids=ids, past_key_values=cache, context_ids=ids[:, :3])
    with pytest.raises(RuntimeError, match="step of each token is unknown"):  # not through the adapted module
        model.get_base_model().model(input_ids=ids)


def test_loop_with_adapter_off_needs_no_context_ids() -> None:
    model = adapted()
    ids = some_ids().clamp_max(63)
    with model.disable_adapter(), torch.no_grad():
        out = model(input_ids=ids[:, :-1], use_cache=True)
        last = model(input_ids=ids[:, -1:], past_key_values=out.past_key_values).logits
        torch.testing.assert_close(last[:, 0], model(input_ids=ids).logits[:, -1], atol=1e-5, rtol=1e-5)
        given = {"input_ids": ids, "max_new_tokens": 6, "do_sample": False}
        assert torch.equal(model.generate(**given), model.generate(**given, use_cache=False))


# --- kept weights


def kept(model: Any) -> dict[int | None, int]:
    """How many layers are bound, by the step (None: tokens of the question or of several steps)."""
    adapters = model.get_base_model().mote_router._cpu_decoder._bound.values()
    return {step: len(bound) for layers in adapters for (step, _), bound in layers.functions.items()}


def in_step(step: str, rows: int = 2, length: int = 5) -> Tensor:
    ids = torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(4))
    ids[:, -1] = START[step]
    return ids


def logits_of(model: Any, ids: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    """What was written and its logits."""
    out = model.generate(
        input_ids=ids, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True,
        suppress_tokens=[2, *range(64, 70)], **given,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("changes", [{}, {"mix": 1.0}, {"rank_pattern": {"q_proj": 2}}], ids=str)
@pytest.mark.parametrize("step", START)
def test_decoding_equals_dense(step: str, changes: dict[str, Any]) -> None:
    model = adapted(**changes)
    ids = in_step(step)
    cache = DynamicCache(config=model.get_base_model().config)
    text, logits = logits_of(model, ids, past_key_values=cache)
    assert kept(model) == {list(START).index(step) + 1: sum(isinstance(m, MoteLinear) for m in model.modules())}
    dense = model(input_ids=text).logits[:, ids.shape[1] - 1 : -1]
    torch.testing.assert_close(logits, dense, atol=1e-5, rtol=1e-5)


def test_mixed_steps_and_the_question_keep_all_columns() -> None:
    mixed = in_step("analysis")
    mixed[1, -1] = START["response"]
    for ids in (mixed, in_step("analysis")[:, :-1]):
        model = adapted()
        text, logits = logits_of(model, ids)
        assert kept(model) == {None: 14}
        dense = model(input_ids=text).logits[:, ids.shape[1] - 1 : -1]
        torch.testing.assert_close(logits, dense, atol=1e-5, rtol=1e-5)


def change(model: Any, how: str) -> None:
    torch.manual_seed(11)
    layers = [module for module in model.modules() if isinstance(module, MoteLinear)]
    weights = [getattr(layer, name)["default"].weight for layer in layers for name in ("mote_A", "mote_B")]
    for weight in weights:
        new = 0.2 * torch.randn_like(weight)
        if how == "data.copy_":
            weight.data.copy_(new)
        elif how == "no_grad":
            with torch.no_grad():
                weight.copy_(new)
        elif how == "new data":
            weight.data = new
        else:
            weight.grad = new
    if how == "optimizer":
        torch.optim.SGD(weights, lr=0.5).step()


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("how", ["data.copy_", "no_grad", "new data", "optimizer"])
def test_new_weights_apply_to_the_next_text(how: str, length: int) -> None:
    model = adapted()
    ids = in_step("response", length=length)
    _, before = logits_of(model, ids)
    change(model, how)
    text, after = logits_of(model, ids)
    assert (after - before).abs().max() > 0.1
    dense = model(input_ids=text).logits[:, length - 1 : -1]
    torch.testing.assert_close(after, dense, atol=1e-5, rtol=1e-5)


def test_new_weights_apply_when_generate_continues_a_cache() -> None:
    model = adapted()
    ids = in_step("response")
    cache = DynamicCache(config=model.get_base_model().config)
    text, _ = logits_of(model, ids, past_key_values=cache)
    change(model, "data.copy_")
    dense = model(input_ids=text[:, -1:], past_key_values=copy.deepcopy(cache), context_ids=text).logits
    _, after = logits_of(model, text, past_key_values=cache)
    torch.testing.assert_close(after[:, :1], dense, atol=1e-5, rtol=1e-5)


def test_new_text_of_a_custom_loop_uses_new_weights() -> None:
    """A prompt of one token in a new cache is a new text, also while the old cache is kept."""
    model = adapted()
    caches = []
    for how in (None, "data.copy_", "optimizer"):
        if how:
            change(model, how)
        ids = torch.tensor([[START["response"]]])
        with torch.inference_mode():
            caches.append(DynamicCache(config=model.get_base_model().config))
            for _ in range(4):
                logits = model(input_ids=ids[:, -1:], past_key_values=caches[-1], context_ids=ids).logits
                ids = torch.cat([ids, torch.tensor([[7]])], dim=1)
        dense = model(input_ids=ids[:, :-1]).logits[:, -1:]
        torch.testing.assert_close(logits, dense, atol=1e-5, rtol=1e-5)


def test_next_turn_of_a_custom_loop_uses_new_weights() -> None:
    model = adapted()
    ids = in_step("response")
    cache = DynamicCache(config=model.get_base_model().config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        for turn in range(2):
            if turn:
                change(model, "data.copy_")
                more = torch.cat([in_step("analysis"), in_step("response")], dim=1)
                ids = torch.cat([ids, more], dim=1)
                model(input_ids=more, past_key_values=cache, context_ids=ids)
            ids = torch.cat([ids, torch.tensor([[7], [8]])], dim=1)
            before = copy.deepcopy(cache)
            written_logits = model(input_ids=ids[:, -1:], past_key_values=cache, context_ids=ids).logits
    dense = model(input_ids=ids[:, -1:], past_key_values=before, context_ids=ids).logits
    torch.testing.assert_close(written_logits, dense, atol=1e-5, rtol=1e-5)


def test_training_after_decoding_works() -> None:
    """Nothing made under inference mode is kept for the backward pass."""
    model = adapted()
    ids = some_ids()
    with torch.inference_mode():
        model.generate(input_ids=ids, max_new_tokens=3)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_threads_decode_different_steps_at_once() -> None:
    model = adapted()
    prompts = [in_step(step, length=4 + i) for i, step in enumerate([*START, *START])]
    prompts += [torch.roll(some_ids(), shift, dims=1) for shift in range(2)]
    expected = [logits_of(model, ids) for ids in prompts]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(3):
            text, logits = logits_of(model, prompts[i])
            if not torch.equal(text, expected[i][0]) or (logits - expected[i][1]).abs().max() > 1e-5:
                wrong.append(i)

    in_threads([functools.partial(work, i) for i in range(len(prompts))])
    assert not wrong


@pytest.mark.parametrize(
    "call",
    [
        lambda model, ids: model.generate_batch(ids.tolist()),
        lambda model, ids: model.init_continuous_batching(),
        lambda model, ids: model.generate(input_ids=ids, cache_implementation="paged"),
        lambda model, ids: model.generate(ids, GenerationConfig(cache_implementation="paged")),
        lambda model, ids: model.generate(ids, generation_config=GenerationConfig(cache_implementation="paged")),
    ],
)
def test_paged_cache_of_transformers_is_refused_by_name(call: Callable[[Any, Tensor], Any]) -> None:
    with pytest.raises(NotImplementedError, match="transformers' continuous batching"):
        call(adapted(), some_ids())
