"""Under torch.compile: one graph, the same numbers, and no graph is made again when the steps change."""

import copy
import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.adapters import adapted, config, some_ids, tiny_llama
from support.one_layer import OneLayer
from support.threads import in_threads
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig

from mote.tuner import MoteModel

pytestmark = pytest.mark.slow
QUESTION_EXPERTS = torch.tensor([1, 2, 3])


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """Number of graphs made so far."""
    return counters["stats"]["unique_graphs"]


def with_one_block(model: Any) -> Any:
    base = model.get_base_model()
    del base.model.layers[1:]
    base.config.num_hidden_layers = 1
    return model


def small(**changes: Any) -> Any:
    return with_one_block(adapted(**changes))


def lora() -> Any:
    plain = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return with_one_block(get_peft_model(tiny_llama(), plain)).eval()


def loss_and_gradients(call: Any, model: Any, ids: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    loss = call(input_ids=ids, labels=ids, use_cache=False, **given).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def batches() -> list[Tensor]:
    """The same shape, other steps: mixed, the question alone, one step, two turns."""
    mixed = some_ids()
    one = mixed.clone()
    one[:, 0] = 66
    return [mixed, mixed.clamp_max(63), one, mixed.roll(4, dims=1)]


@pytest.mark.parametrize("begun", [False, True], ids=["at once", "after eager"])
def test_whole_model_is_one_graph_for_all_steps(begun: bool) -> None:
    model = small()
    if begun:
        model(input_ids=some_ids())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for ids in batches():
            expected = model(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)
            assert graphs() == 1


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
def test_training_is_one_graph_for_all_steps(checkpointed: bool) -> None:
    model = small().train()
    expected = [loss_and_gradients(model, model, ids, question_experts=QUESTION_EXPERTS) for ids in batches()]
    if checkpointed:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for ids, (loss, grads) in zip(batches(), expected, strict=True):
        found = loss_and_gradients(compiled, model, ids, question_experts=QUESTION_EXPERTS)
        torch.testing.assert_close(found[0], loss, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[1], grads, atol=1e-5, rtol=1e-5)
        assert graphs() <= 1 + checkpointed  # the first forward binds the expert weights to the blocks: one more graph


def test_question_experts_are_redrawn_in_each_run_of_a_graph() -> None:
    model = small().train()
    ids = torch.randint(3, 60, (1, 8))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        seen = {round(float(compiled(input_ids=ids, use_cache=False).logits.sum()), 2) for _ in range(20)}
    assert len(seen) == 3 and graphs() == 1


def explained(model: Any, ids: Tensor) -> tuple[int, int]:
    found = torch._dynamo.explain(model)(input_ids=ids)
    return found.graph_break_count, found.graph_count


def test_our_code_causes_no_graph_break() -> None:
    with torch.no_grad():
        theirs = explained(lora(), some_ids().clamp_max(63))
        torch._dynamo.reset()
        assert explained(small(), some_ids()) == theirs


def test_foreign_graph_breaks_keep_the_expert_weights() -> None:
    """In the middle of a model, with checkpointed blocks behind it, and with several threads in it."""
    model = small().train()
    expected = [loss_and_gradients(model, model, ids, question_experts=QUESTION_EXPERTS) for ids in batches()]
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    model.get_base_model().model.layers[0].register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    compiled = torch.compile(model, backend="eager")
    for ids, (loss, grads) in zip(batches(), expected, strict=True):
        found = loss_and_gradients(compiled, model, ids, question_experts=QUESTION_EXPERTS)
        torch.testing.assert_close(found, (loss, grads), atol=1e-5, rtol=1e-5)
    assert counters["graph_break"]
    model.eval()
    wanted = [model(input_ids=ids).logits.detach() for ids in batches()]
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                if (compiled(input_ids=batches()[i]).logits - wanted[i]).abs().max() > 1e-5:
                    wrong.append(i)

    work(0)  # compiles
    in_threads([functools.partial(work, i) for i in range(4)])
    assert not wrong


def test_blocks_may_be_compiled_alone() -> None:
    """Regional compilation, in training and in generation; no more graphs than a plain LoRA needs."""

    def needed(make: Callable[[], Any], ids: Tensor, given: dict[str, Any]) -> list[int]:
        torch._dynamo.reset()
        counters.clear()
        model = make()
        whole = copy.deepcopy(model)
        for block in model.get_base_model().model.layers:
            block.compile(backend="aot_eager", fullgraph=True)
        found = loss_and_gradients(model.train(), model, ids, **given)
        counts = [graphs()]
        torch.testing.assert_close(found, loss_and_gradients(whole.train(), whole, ids, **given), atol=1e-5, rtol=1e-5)
        written = {"input_ids": ids, "max_new_tokens": 5, "do_sample": False}
        assert torch.equal(model.eval().generate(**written), whole.eval().generate(**written))
        return [*counts, graphs()]

    ids = some_ids()
    ids[:, -1] = torch.tensor([64, 66, 68])
    ours = needed(small, ids, {"question_experts": QUESTION_EXPERTS})
    assert all(one <= two for one, two in zip(ours, needed(lora, ids.clamp_max(63), {}), strict=True))


def test_decoding_with_a_static_cache_compiles_once() -> None:
    """As `generate` does by itself on a GPU: no graph again while rows go from step to step."""
    model = small()
    ids = some_ids()
    ids[:, -1] = torch.tensor([64, 66, 68])
    how = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    how._compile_all_devices = True
    given = {"input_ids": ids, "max_new_tokens": 10, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(**given, disable_compile=True)
    assert graphs() == 0
    assert torch.equal(model.generate(**given, compile_config=how), expected)
    assert graphs() == 2  # the expert weights, and the model


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_inductor_output_equals_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model of one layer, since each of inductor's kernels takes seconds to compile."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(1)
    conf = config(target_modules=["linear"], vocab_size=None, draw_question_expert=False)
    model = MoteModel(OneLayer(70), conf, "default")
    ids = some_ids()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def with_gradients(call: Any) -> list[Tensor]:
        out = call(input_ids=ids)
        return [out, *torch.autograd.grad(out.square().mean(), weights)]

    # Neither precompiled headers nor vector instructions: to set them up takes longer than the rest.
    with torch._inductor.config.patch({"cpp_cache_precompile_headers": False, "cpp.vec_isa_ok": False}):
        compiled = torch.compile(model, backend="inductor", fullgraph=True)
        torch.testing.assert_close(with_gradients(compiled), with_gradients(model), atol=1e-5, rtol=1e-5)
