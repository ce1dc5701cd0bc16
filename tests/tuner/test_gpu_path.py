"""What runs on a GPU, on tensors of the `meta` device: no CPU form, and nothing that waits for the device.

They have no values: reading one fails, as do most operations with a tensor on the CPU.
"""

from concurrent.futures import Future
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.adapters import config
from support.gpu import llama
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from mote.inference.batching import Batcher
from mote.inference.grammar import FreeText
from mote.inference.kv_slots import EMPTY, PrefillChunk
from mote.inference.request import Request
from mote.inference.sequence import RunningSequence
from mote.models import linear
from mote.models.attention import GROUPED_SDPA, DocumentMask, grouped_sdpa
from mote.models.linear import lay_out_by_columns, speed_up
from mote.models.load import default_attention
from mote.tokens.masks import Layout, block_mask, document_mask, sdpa_mask
from mote.train.loss import plain_head, tiled_losses

GPU = "meta"


class Operations(TorchDispatchMode):
    """Records the names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operation: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(operation))
        return operation(*args, **(kwargs or {}))


def experts(device: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model with step experts as `mote.load` and `mote train` prepare it."""
    base = llama(70).to(dtype)
    speed_up(base)
    if device == "cpu":
        lay_out_by_columns(base)
    model = get_peft_model(base, config(r=4, lora_alpha=8))
    model.get_base_model().set_attn_implementation(default_attention("cpu" if device == "cpu" else "cuda"))
    return model


def move(model: Any) -> None:
    """Put tensors without values in place of the model's."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype, device=GPU)
                    made[id(old)] = torch.nn.Parameter(new, old.requires_grad) if tensors is module._parameters else new
                tensors[name] = made[id(old)]


def train_one_batch(model: Any, device: str) -> Tensor:
    """Loss and gradients of packed rows with skipped steps, as `MoteTrainer` computes them."""
    rows, length = 2, 24
    ids = torch.randint(3, 60, (rows, length), device=device)
    steps = torch.zeros_like(ids)
    documents = torch.arange(length, device=device).div(12, rounding_mode="floor").expand(rows, -1)
    visibility = torch.ones(rows, length, 4, dtype=torch.bool, device=device)
    make_mask = document_mask if default_attention("cpu" if device == "cpu" else "cuda") == GROUPED_SDPA else sdpa_mask
    mask = make_mask(Layout(steps, visibility, documents))
    inputs = {
        "input_ids": ids, "position_ids": ids, "step_ids": steps, "document_ids": documents, "attention_mask": mask,
        "question_experts": torch.ones_like(ids), "use_cache": False,
    }  # fmt: skip
    head = plain_head(model)
    assert head is not None
    if device != "cpu":  # which tokens have a label is read from the device, once a batch
        loss: Tensor = model(**inputs).logits.float().logsumexp(-1).sum()
    else:
        loss = tiled_losses(model, inputs, ids, head).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


@pytest.fixture(autouse=True)
def tempted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where oneDNN is faster; meta tensors have no autocast to ask for."""
    monkeypatch.setattr(linear, "ONEDNN_IS_FASTER", linear.HAS_ONEDNN)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_training_takes_no_cpu_form(dtype: torch.dtype) -> None:
    model = experts(GPU, dtype).train()
    with Operations() as seen:
        move(model)
        loss = train_one_batch(model, GPU)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert loss.device.type == GPU and len(trained) > 28
    assert all(p.grad is not None and p.grad.device == p.device and p.device.type == GPU for p in trained)
    assert not [name for name in seen.names if "mkldnn" in name or "for_cpu" in name]


@pytest.mark.skipif(not linear.HAS_ONEDNN, reason="PyTorch has no oneDNN here")
def test_training_on_a_cpu_takes_its_own_forms() -> None:
    """Negative control."""
    model = experts("cpu").train()
    with Operations() as seen:
        train_one_batch(model, "cpu")
    assert [name for name in seen.names if "mkldnn._linear_pointwise" in name]
    assert [name for name in seen.names if "for_cpu" in name]


def decode(model: Any, device: str) -> list[bool]:
    """Decode two tokens after a prompt; whether the CPU's fast path was taken in each pass."""
    taken: list[bool] = []
    router = model.get_base_model().mote_router
    model.get_base_model().model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda *_: taken.append(router.decode_step() is not None)
    )
    ids = torch.randint(3, 60, (3, 8), device=device)
    cache = DynamicCache(config=model.config)
    steps = torch.ones_like(ids)
    for begin, end in ((0, 6), (6, 7), (7, 8)):
        part = slice(begin, end)
        model(input_ids=ids[:, part], step_ids=steps[:, part], past_key_values=cache, use_cache=True)
    return taken


def test_decoding_takes_no_cpu_form() -> None:
    model = experts(GPU).eval()
    with torch.no_grad(), Operations() as seen:
        move(model)
        assert decode(model, GPU) == [False, False, False]
        base = torch.nn.Linear(4, 4, device=GPU)
        speed_up(base)
        assert type(base) is torch.nn.Linear
        lay_out_by_columns(model)
        assert all(module.weight.is_contiguous() for module in model.modules() if linear.is_linear(module))
    assert not [name for name in seen.names if "mkldnn" in name or "for_cpu" in name]
    model = experts("cpu").eval()
    with torch.no_grad():  # negative control
        assert decode(model, "cpu") == [False, True, True]
    assert not all(module.weight.is_contiguous() for module in model.modules() if linear.is_linear(module))


def test_running_batch_waits_only_for_its_tokens() -> None:
    """Forward passes of decoding sequences and prefill chunks."""
    markers = config().routing
    model = experts(GPU).eval()
    with torch.no_grad():
        move(model)
        running = Batcher(model, 4, markers)
        rows = []
        for start in (64, 68, 66, 64):
            request = Request([5, start, 7, 8], FreeText(()), 4)
            rows.append(RunningSequence(request, Future(), request.ids))
            running._set_steps(rows[-1])
        chunks = [(row, PrefillChunk(4 * i, 4 * i + 4, i, 0, EMPTY)) for i, row in enumerate(rows[:3])]
        running._run_model([], chunks, torch.tensor([3, 7, 11]))
        for row in rows[:3]:
            row.cached = 4
            row.generated = [7]
        late = [(rows[3], PrefillChunk(3, 7, 3, 0, EMPTY))]
        logits = running._run_model(rows[:3], late, torch.tensor([0, 1, 2, 6]))
        assert tuple(logits.shape) == (4, 70) and logits.device.type == GPU
        with pytest.raises(RuntimeError):  # the tokens themselves are read
            running._take(rows[:3], logits[:3])


def test_flex_attention_masks_wait_for_nothing() -> None:
    steps = torch.zeros(2, 300, dtype=torch.long, device=GPU)
    visibility = torch.ones(2, 300, 4, dtype=torch.bool, device=GPU)
    made = block_mask(Layout(steps, visibility, torch.zeros_like(steps)))
    assert made.kv_num_blocks.device.type == GPU and tuple(made.shape) == (2, 1, 300, 300)


def test_masks_of_a_gpu_know_no_documents() -> None:
    given = Layout(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, 4, dtype=torch.bool), torch.zeros(1, 4))
    assert type(sdpa_mask(given)) is Tensor and default_attention("cuda:1") == "sdpa"
    assert type(document_mask(given)) is DocumentMask and grouped_sdpa.__name__ == default_attention("cpu")
