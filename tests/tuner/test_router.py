"""How expert weights reach the layers: several adapters, every form of checkpointing, threads, copies, unloading."""

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import get_peft_model
from support.adapters import adapted, config, some_ids, tiny_llama
from support.threads import in_threads
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers import Trainer, TrainingArguments
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from mote.tokens.routing import NO_STEP
from mote.tuner import MoteConfig
from mote.tuner.layer import MoteLinear

QUESTION_EXPERTS = torch.tensor([1, 2, 3])
# --- several adapters with different markers

PLAN = {"plan": [70, 71], "answer": [72, 73]}


def two_schemes() -> Any:
    """`default` has three steps, `second` two with other markers, another rank, and its own turns."""
    torch.manual_seed(1)
    model = get_peft_model(tiny_llama(), config(vocab_size=74))
    second = MoteConfig(
        r=2, lora_alpha=6, experts=("plan", "answer"), markers=PLAN, turn_ids=[3], vocab_size=74, mix=0.7,
        question_expert="answer", init_weights=False,
    )  # fmt: skip
    model.add_adapter("second", second)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens" in name:
                parameter.add_(torch.randn_like(parameter))
    return model.eval()


def ids_of_both() -> Tensor:
    ids = some_ids(rows=2)
    ids[0, 3], ids[0, 8], ids[1, 2], ids[1, 13] = 70, 72, 72, 3
    return ids


def test_each_adapter_routes_by_its_own_markers() -> None:
    model = two_schemes()
    ids = ids_of_both()
    given = {"input_ids": ids, "max_new_tokens": 8, "do_sample": False}
    found = {}
    for name in ("default", "second", "default"):
        model.set_adapter(name)
        logits = model(input_ids=ids).logits
        text = model.generate(**given)
        assert torch.equal(text, model.generate(**given, use_cache=False))
        router = model.get_base_model().mote_router
        alone = model(input_ids=ids, step_ids=router.steps(ids, ids.shape[1])[name]).logits
        assert torch.equal(logits, alone)
        if name in found:
            assert torch.equal(found[name][0], logits) and torch.equal(found[name][1], text)
        found[name] = logits, text
    assert (found["default"][0] - found["second"][0]).abs().max() > 0.1
    model.delete_adapter("second")
    assert torch.equal(model(input_ids=ids).logits, found["default"][0])
    assert torch.equal(model.generate(**given), found["default"][1])


def test_steps_are_those_of_the_active_adapters_scheme() -> None:
    model = two_schemes()
    ids = torch.tensor([[5, 64, 70, 3, 66, 72, 2, 6]])
    router = model.get_base_model().mote_router
    assert {name: steps.tolist() for name, steps in router.steps(ids, 6).items()} == {"default": [[1, 1, 2, 2, 0, 0]]}
    model.set_adapter("second")
    assert {name: steps.tolist() for name, steps in router.steps(ids, 6).items()} == {"second": [[1, 0, 0, 2, 2, 2]]}
    model.base_model.set_adapter(["default"])
    with model.disable_adapter():
        assert not router.steps(ids, 6)


def test_a_deleted_adapters_name_may_be_given_to_another_scheme() -> None:
    model = two_schemes()
    ids = ids_of_both()
    second = model.peft_config["second"]
    model.set_adapter("second")
    expected = model(input_ids=ids).logits
    state = {name: value.clone() for name, value in model.state_dict().items() if ".second" in name}
    model.set_adapter("default")
    model.delete_adapter("second")
    model.add_adapter("second", config(r=3, vocab_size=74))
    model.set_adapter("second")
    assert (model.eval()(input_ids=ids).logits - expected).abs().max() > 0.1
    model.set_adapter("default")
    model.delete_adapter("second")
    model.add_adapter("second", second)
    model.load_state_dict(state, strict=False)
    model.set_adapter("second")
    assert torch.equal(model.eval()(input_ids=ids).logits, expected)


def test_adapters_are_added_and_removed_by_transformers() -> None:
    """These do not notify the tuner when they delete an adapter."""
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"transformers asks for PEFT {MIN_PEFT_VERSION}")
    ids = some_ids()
    found = []
    base = tiny_llama(vocab=70)
    for mix in (0.2, 0.9):
        torch.manual_seed(1)
        base.add_adapter(config(mix=mix), "x")
        found.append(base.eval()(input_ids=ids).logits)
        other = tiny_llama(vocab=70)
        torch.manual_seed(1)
        alone = get_peft_model(other, config(mix=mix)).eval()
        assert torch.equal(alone(input_ids=ids).logits, found[-1])
        base.delete_adapter("x")
        assert torch.equal(base(input_ids=ids).logits, tiny_llama(vocab=70)(input_ids=ids).logits)
    assert (found[0] - found[1]).abs().max() > 1e-3


# --- who reads the question


def test_tokens_without_a_step_equal_the_base_model() -> None:
    model = adapted().eval()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    steps = torch.full_like(ids, NO_STEP)
    mixed = torch.stack([steps[0], torch.ones_like(steps[1])])
    with torch.no_grad():
        alone = model(input_ids=ids, step_ids=steps).logits[..., :64]  # without the markers'
        beside = model(input_ids=ids, step_ids=mixed).logits[..., :64]
    hidden = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=hidden, step_ids=steps).logits[..., :64].sin().sum().backward()
    gradient = hidden.grad
    hidden.grad = None
    with model.disable_adapter():
        wanted = model(inputs_embeds=hidden).logits[..., :64]
        wanted.sin().sum().backward()
    assert torch.equal(alone, wanted)
    torch.testing.assert_close(beside[0], wanted[0], atol=1e-5, rtol=1e-5)
    assert (beside[1] - wanted[1]).abs().max() > 0.1
    assert gradient is not None and hidden.grad is not None
    torch.testing.assert_close(gradient, hidden.grad, atol=1e-5, rtol=1e-5)


def test_question_experts_are_given_by_row_or_by_token() -> None:
    model = adapted()
    ids = some_ids()
    by_row = model(input_ids=ids, question_experts=QUESTION_EXPERTS).logits
    by_token = model(input_ids=ids, question_experts=QUESTION_EXPERTS[:, None].expand_as(ids)).logits
    assert torch.equal(by_row, by_token)
    for row, expert in enumerate(QUESTION_EXPERTS.tolist()):
        steps = model.get_base_model().mote_router.steps(ids, ids.shape[1])["default"]
        steps = torch.where(steps == 0, expert, steps)
        torch.testing.assert_close(model(input_ids=ids, step_ids=steps).logits[row], by_row[row], atol=1e-5, rtol=1e-5)


def test_one_expert_is_drawn_for_each_document_of_a_packed_row() -> None:
    model = adapted(experts=("analysis", "guidance", "response"), mix=1.0).train()
    router = model.get_base_model().mote_router
    seen = []
    layer = next(module for module in model.modules() if isinstance(module, MoteLinear))
    layer.register_forward_pre_hook(
        lambda *_: seen.append(router.route("default", 4).weights[0].reshape(12, 3, 4)[..., 0])
    )
    documents = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3])
    for _ in range(20):
        model(input_ids=torch.randint(3, 60, (1, 12)), document_ids=documents)
    drawn = [weights.argmax(1).tolist() for weights in seen]
    assert all(len({row[t] for t in span}) == 1 for row in drawn for span in (range(5), range(5, 9), range(9, 12)))
    assert any(row[0] != row[5] for row in drawn) and any(row[5] != row[9] for row in drawn)


# --- gradient checkpointing


def gradients(model: Any, ids: Tensor) -> Tensor:
    """Of two forward passes before one backward pass."""
    model.zero_grad()
    given = {"question_experts": QUESTION_EXPERTS, "use_cache": False}
    first = model(input_ids=ids, labels=ids, **given).loss
    second = model(input_ids=ids.flip(0), labels=ids.flip(0), **given).loss
    (first + 2 * second).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def enable(model: Any, form: str) -> None:
    model.enable_input_require_grads()
    if form.startswith("wrapper"):  # FSDP's way, which knows nothing of transformers
        kind = CheckpointImpl.REENTRANT if form == "wrapper reentrant" else CheckpointImpl.NO_REENTRANT
        apply_activation_checkpointing(
            model.get_base_model(),
            checkpoint_wrapper_fn=lambda module: checkpoint_wrapper(module, kind),
            check_fn=lambda module: isinstance(module, LlamaDecoderLayer),
        )
    else:
        options = {"every_n_layers": 2} if form == "every second" else {}
        kwargs = None if form == "default" else {"use_reentrant": form == "reentrant"}
        model.get_base_model().gradient_checkpointing_enable(kwargs, **options)


@pytest.mark.parametrize(
    "form", ["default", "reentrant", "not reentrant", "every second", "wrapper", "wrapper reentrant"]
)
def test_checkpointed_gradients_are_the_plain_ones(form: str) -> None:
    model = adapted().train()
    ids = some_ids()
    plain = gradients(model, ids)
    enable(model, form)
    runs: list[int] = []
    block = next(module for module in model.modules() if isinstance(module, LlamaDecoderLayer))
    block.mlp.register_forward_pre_hook(lambda *_: runs.append(1))  # since 5.24 the block's own hooks do not run again
    torch.testing.assert_close(gradients(model, ids), plain, atol=1e-6, rtol=0)
    assert len(runs) == 4  # each ran again
    torch.testing.assert_close(gradients(model, ids), plain, atol=1e-6, rtol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_may_precede_the_adapter_and_be_disabled(reentrant: bool) -> None:
    ids = some_ids()
    plain = gradients(adapted().train(), ids)
    base = tiny_llama()
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(1)
    model = get_peft_model(base, config())
    model.load_state_dict(adapted().state_dict())
    torch.testing.assert_close(gradients(model.train(), ids), plain, atol=1e-6, rtol=0)
    model.gradient_checkpointing_disable()
    torch.testing.assert_close(gradients(model, ids), plain, atol=0, rtol=0)
    assert not any(isinstance(m, nn.Module) and getattr(m, "gradient_checkpointing", False) for m in model.modules())


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = some_ids()[index]
        return {"input_ids": ids, "labels": ids}


def after_training(tmp_path: Path, **arguments: Any) -> Tensor:
    model = adapted(draw_question_expert=False)
    given = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=3, learning_rate=1e-2, report_to="none",
        use_cpu=True, save_strategy="no", disable_tqdm=True, optim="sgd", max_grad_norm=0.0, **arguments,
    )  # fmt: skip
    Trainer(model=model, args=given, train_dataset=Rows()).train()
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_trainers_own_checkpointing_trains_the_same(reentrant: bool, tmp_path: Path) -> None:
    plain = after_training(tmp_path)
    checkpointed = after_training(
        tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=0)
    assert (plain - torch.cat([p.flatten() for p in adapted().parameters() if p.requires_grad])).abs().max() > 1e-4


@pytest.mark.parametrize("form", [None, "reentrant", "not reentrant"], ids=str)
def test_backward_passes_may_run_in_other_threads(form: str | None) -> None:
    model = adapted().train()
    weights = [p for p in model.parameters() if p.requires_grad]
    batches = [torch.roll(some_ids(), shift, dims=1) for shift in range(4)]

    def loss(i: int) -> Tensor:
        found: Tensor = model(input_ids=batches[i], labels=batches[i], question_experts=QUESTION_EXPERTS).loss
        return found

    expected = [torch.autograd.grad(loss(i), weights) for i in range(4)]
    if form:
        enable(model, form)
    losses: dict[int, Tensor] = {}
    if form == "reentrant":  # allows no autograd.grad: one after the other in the backward pass
        in_threads([lambda i=i: losses.update({i: loss(i)}) for i in range(4)])
        for i in range(4):
            model.zero_grad()
            in_threads([losses[i].backward])
            for weight, wanted in zip(weights, expected[i], strict=True):
                torch.testing.assert_close(weight.grad, wanted, atol=1e-6, rtol=0)
        return
    found: dict[int, tuple[Tensor, ...]] = {}
    in_threads([lambda i=i: losses.update({i: loss(i)}) for i in range(4)])
    back = [lambda i=i: found.update({i: torch.autograd.grad(losses[i], weights)}) for i in range(4)]
    in_threads([*back, lambda: [loss(0) for _ in range(3)]])  # with other forward passes beside them
    for i in range(4):
        for one, wanted in zip(found[i], expected[i], strict=True):
            torch.testing.assert_close(one, wanted, atol=1e-6, rtol=0)


def test_a_nested_forward_keeps_the_outer_steps() -> None:
    model = adapted()
    ids = some_ids()
    alone = model(input_ids=ids).logits
    other = ids.flip(0)
    inner: list[Tensor] = []

    def look(*_: Any) -> None:
        handle.remove()
        inner.append(model(input_ids=other).logits)

    handle = model.get_base_model().model.layers[1].register_forward_pre_hook(look)
    assert torch.equal(model(input_ids=ids).logits, alone)
    assert torch.equal(inner[0], model(input_ids=other).logits)


def test_a_failed_forward_leaves_no_steps() -> None:
    model = adapted()
    ids = some_ids()
    with pytest.raises(IndexError):
        model(input_ids=ids + 1000)
    with pytest.raises(RuntimeError, match="step of each token is unknown"):
        model.get_base_model().model(input_ids=ids)


# --- copies


def test_a_copy_routes_decodes_and_trains_independently() -> None:
    model = adapted().train()
    ids = some_ids()
    enable(model, "not reentrant")
    plain = gradients(model, ids)  # leaves what a forward pass leaves
    model.eval()
    model.generate(input_ids=ids, max_new_tokens=2)
    twin = copy.deepcopy(model)
    routers = [m.get_base_model().mote_router for m in (model, twin)]
    assert routers[0] is not routers[1]
    assert {layer.router for layer in twin.modules() if isinstance(layer, MoteLinear)} == {routers[1]}
    expected = model(input_ids=ids).logits
    text = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    model.delete_adapter("default")
    del model
    assert torch.equal(twin(input_ids=ids).logits, expected)
    assert torch.equal(twin.generate(input_ids=ids, max_new_tokens=8, do_sample=False), text)
    torch.testing.assert_close(gradients(twin.train(), ids), plain, atol=1e-6, rtol=0)


def test_a_pickled_model_is_the_same() -> None:
    model = adapted()
    ids = some_ids()
    text = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)
    assert torch.equal(twin.generate(input_ids=ids, max_new_tokens=8, do_sample=False), text)


# --- leaving


def works_as_a_base(model: Any, ids: Tensor) -> Tensor:
    """Logits; a decoding loop with a cache needs no extra arguments."""
    given = {"input_ids": ids, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**given), model.generate(**given, use_cache=False))
    with torch.no_grad():
        cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        last = model(input_ids=ids[:, -1:], past_key_values=cache).logits
        logits: Tensor = model(input_ids=ids).logits
    torch.testing.assert_close(last[:, 0], logits[:, -1], atol=1e-5, rtol=1e-5)
    return logits


@pytest.mark.parametrize("tied", [True, False])
def test_unloading_restores_the_base(tied: bool) -> None:
    model = adapted(tied)
    ids = some_ids().clamp_max(63)
    base = model.get_base_model()
    enable(model.train(), "not reentrant")
    gradients(model, ids)
    model.gradient_checkpointing_enable()
    assert base._forward_pre_hooks and "prepare_inputs_for_generation" in vars(base)
    gone = model.eval().unload()
    assert gone is base and not isinstance(base.lm_head, MoteLinear)
    assert not (base._forward_pre_hooks or base._forward_hooks or base._forward_hooks_always_called)
    assert not {"mote_router", "prepare_inputs_for_generation"} & set(vars(base))
    assert "mote" not in repr([vars(module).get("_gradient_checkpointing_func") for module in base.modules()])
    logits = works_as_a_base(base, ids)
    torch.testing.assert_close(logits[..., :64], tiny_llama(tied)(input_ids=ids).logits, atol=1e-6, rtol=0)
    again = get_peft_model(base, config()).eval()
    assert (again(input_ids=ids).logits - logits).abs().max() > 0.1


def test_without_its_last_adapter_a_model_is_the_base() -> None:
    model = adapted()
    ids = some_ids().clamp_max(63)
    model.delete_adapter("default")
    logits = works_as_a_base(model.base_model.model, ids)
    torch.testing.assert_close(logits[..., :64], tiny_llama()(input_ids=ids).logits, atol=1e-6, rtol=0)


def test_data_parallel_is_refused_by_name() -> None:
    replica = adapted().get_base_model()._replicate_for_data_parallel()  # as nn.DataParallel makes one for each GPU
    with pytest.raises(RuntimeError, match=r"nn\.DataParallel is not supported: start one process per GPU"):
        replica(input_ids=some_ids())


# --- logits_to_keep


@torch.no_grad()
@pytest.mark.parametrize("keep", [1, 3])
def test_kept_logits_read_no_strided_slice(keep: int) -> None:
    """PyTorch copies a frozen bfloat16 head on a CPU for one (findings/logits_to_keep_copies_the_head.sh)."""
    model = adapted()
    ids = some_ids(rows=2)
    whole = model(input_ids=ids).logits
    seen: list[bool] = []
    model.get_base_model().get_output_embeddings().register_forward_pre_hook(
        lambda _, given: seen.append(given[0].is_contiguous())
    )
    last = model(input_ids=ids, logits_to_keep=keep).logits
    assert seen == [True]
    torch.testing.assert_close(last, whole[:, -keep:], atol=1e-5, rtol=0)
