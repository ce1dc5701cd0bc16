"""Tests on a GPU against the CPU reference: the device, models large enough for its kernels, and relative errors.

`MOTE_GPU_DEVICE=cpu` lets the CPU stand in for the GPU, so that every line of these tests runs where there is none.
"""

import copy
import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.flex_attention import WrappedFlexAttention

from mote.models.load import default_attention
from support.adapters import config

DEVICE = os.environ.get("MOTE_GPU_DEVICE", "cuda")
WHY_NOT = "" if DEVICE == "cpu" or torch.cuda.is_available() else "no CUDA device (docs/gpu.md)"
# Largest relative error, in the Euclidean norm, against the same weights in float64 on the CPU.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
Measure = Callable[[str, Any, Any, float], None]


def llama(vocab: int = 64) -> Any:
    """A random Llama whose heads (16) FlexAttention's kernels take."""
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=vocab, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(settings).eval()


def on_both(dtype: torch.dtype, **changes: Any) -> tuple[Any, Any]:
    """A model with step experts on the device in `dtype`, and its reference: the same weights in float64 on the CPU."""
    torch.manual_seed(1)
    model = get_peft_model(llama(), config(**{"r": 8, "lora_alpha": 16, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "mote_B" in name:
                parameter.mul_(0.1)
    model = model.to(dtype)
    reference = copy.deepcopy(model).double()
    model = model.to(DEVICE)
    model.get_base_model().set_attn_implementation(default_attention(DEVICE))
    return model.eval(), reference.eval()


def relative_error(found: Tensor | Iterable[Tensor], wanted: Tensor | Iterable[Tensor]) -> float:
    """Norm of the difference over the norm of the reference, over all tensors together."""
    pairs = [(found, wanted)] if isinstance(found, Tensor) else list(zip(found, wanted, strict=True))
    one, other = (torch.cat([pair[i].detach().double().cpu().flatten() for pair in pairs]) for i in (0, 1))
    return float((one - other).norm() / other.norm())


def gradients(model: Any) -> list[Tensor]:
    """Gradients of the trained parameters, each of which has one."""
    found = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None for gradient in found)
    return found


@pytest.fixture
def measure(record_property: Callable[[str, object], None]) -> Measure:
    """Asserts that a relative error is within a limit, and records it for benchmarks/gpu.py."""

    def check(name: str, found: Any, wanted: Any, limit: float) -> None:
        error = relative_error(found, wanted)
        record_property(name, json.dumps({"error": error, "limit": limit}))
        assert error <= limit, f"{name}: relative error {error:.2e}, limit {limit:.0e}"

    return check


@pytest.fixture
def with_flex(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """FlexAttention, compiled; where the CPU stands in, the form that PyTorch runs without a compiler.

    PyTorch refuses gradients of FlexAttention on a CPU, although that form computes them.
    """
    if DEVICE == "cuda":
        return torch.compile(flex.flex_attention)
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(WrappedFlexAttention, "__call__", lambda _: flex.flex_attention)
    return flex.flex_attention
