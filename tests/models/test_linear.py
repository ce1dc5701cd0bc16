"""The product by oneDNN against PyTorch's own, and the frozen layers that take it."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

import mote
from mote.inference.engines.local import LocalEngine
from mote.models import linear as linear_module
from mote.models.linear import FrozenLinear, add_matmul, bind, fast_matmul, is_linear, is_plain, speed_up
from mote.models.load import load_base

SIZES = st.integers(1, 70)


@pytest.fixture(autouse=True)
def _onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that is not Intel's, wherever the tests run."""
    monkeypatch.setattr(linear_module, "ONEDNN_IS_FASTER", linear_module.HAS_ONEDNN)


def random(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


@given(st.lists(SIZES, min_size=0, max_size=2), SIZES, SIZES, st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_fast_matmul_equals_pytorchs(rows: list[int], inputs: int, outputs: int, by_column: bool, biased: bool,
                                 strided: bool) -> None:  # fmt: skip
    """For any number of rows and axes, a weight laid out by rows or by columns, an input that is a view."""
    x = random(*rows, inputs)
    weight = random(outputs, inputs)
    bias = random(outputs) if biased else None
    if by_column:
        weight = weight.t().contiguous().t()
    if strided:
        x = random(*rows, 2 * inputs)[..., ::2]
    torch.testing.assert_close(fast_matmul(x, weight, bias), linear(x, weight, bias), atol=1e-4, rtol=1e-4)
    if len(rows) == 1:
        out = random(*rows, outputs)
        wanted = out + linear(x, weight)
        for matmul in (fast_matmul, linear):
            given = out.clone()
            assert add_matmul(matmul, given, x, weight) is given
            torch.testing.assert_close(given, wanted, atol=1e-4, rtol=1e-4)


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each product that is not PyTorch's own."""
    found: list[int] = []
    own = linear_module._onednn_is_faster

    def watched(x: Tensor, weight: Tensor) -> bool:
        found.extend([1] if own(x, weight) else [])
        return own(x, weight)

    monkeypatch.setattr(linear_module, "_onednn_is_faster", watched)
    return found


@pytest.mark.skipif(not linear_module.HAS_ONEDNN, reason="oneDNN was measured on x86 processors alone")
def test_other_dtypes_and_empty_inputs_use_pytorchs_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    found = calls(monkeypatch)
    fast_matmul(random(3, 4), random(5, 4))
    assert found == [1]
    for dtype in (torch.float64, torch.bfloat16):
        assert fast_matmul(random(3, 4).to(dtype), random(5, 4).to(dtype)).dtype == dtype
    assert fast_matmul(random(0, 4), random(5, 4)).shape == (0, 5)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    fast_matmul(random(3, 4), random(5, 4))
    assert found == [1]


def test_intel_cpus_keep_pytorchs_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is what `speed_up` leaves them with, to the last digit."""
    monkeypatch.setattr(linear_module, "ONEDNN_IS_FASTER", False)
    x = random(3, 4)
    layer = nn.Linear(4, 5).requires_grad_(False)
    wanted = layer(x)
    speed_up(layer)
    assert torch.equal(layer(x), wanted) and torch.equal(bind(layer)(x), wanted)
    told = {"GenuineIntel": False, "AuthenticAMD": linear_module.HAS_ONEDNN}
    command = (
        "from mote.core import machine; machine.cpu_vendor = lambda: '{}'; "
        "import mote.models.linear; print(mote.models.linear.ONEDNN_IS_FASTER)"
    )
    for vendor, here in told.items():
        found = subprocess.run(
            [sys.executable, "-c", command.format(vendor)], capture_output=True, text=True, check=True
        )
        assert found.stdout.strip() == str(here)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_bound_matmul_is_the_layers(rows: int, fast: bool, biased: bool) -> None:
    layer = nn.Linear(24, 10, bias=biased).requires_grad_(False)
    x = random(rows, 24)
    wanted = layer(x)
    if fast:
        speed_up(layer)
    torch.testing.assert_close(bind(layer)(x), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("biased", [True, False])
def test_a_frozen_layer_keeps_its_output_and_input_gradient(biased: bool) -> None:
    layer = nn.Linear(24, 10, bias=biased).requires_grad_(False)
    x = random(2, 5, 24).requires_grad_()
    wanted = layer(x)
    (wanted_grad,) = torch.autograd.grad(wanted.sin().sum(), x)
    speed_up(layer)
    assert type(layer) is FrozenLinear and is_linear(layer) and is_plain(layer)
    found = layer(x)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(found.sin().sum(), x)[0], wanted_grad, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert torch.equal(layer(x), found)


@pytest.mark.parametrize("trained", ["weight", "bias", "both"])
def test_a_layer_that_is_trained_has_its_own_gradients(trained: str) -> None:
    layer = nn.Linear(6, 3)
    x = random(4, 6)
    layer.weight.requires_grad_(trained != "bias")
    layer.bias.requires_grad_(trained != "weight")
    layer(x).sin().sum().backward()
    wanted = [parameter.grad for parameter in layer.parameters()]
    other = copy.deepcopy(layer)
    other.zero_grad()
    speed_up(other)
    other(x).sin().sum().backward()
    for parameter, grad in zip(other.parameters(), wanted, strict=True):
        assert (parameter.grad is None) == (grad is None)
        assert grad is None or torch.equal(parameter.grad, grad)  # type: ignore[arg-type]


def test_a_sped_up_model_is_copied_pickled_saved_and_compiled() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).requires_grad_(False)
    names = list(model.state_dict())
    x = random(3, 8)
    speed_up(model)
    wanted = model(x)
    assert list(model.state_dict()) == names
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), wanted)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), wanted, atol=1e-5, rtol=1e-5)


def test_answers_use_fast_matmul_and_chain_engines_do_not(tiny: Path) -> None:
    base = load_base(str(tiny), "cpu")
    LocalEngine(base, 2)
    assert FrozenLinear not in {type(module) for module in base.model.modules()}
    assert FrozenLinear in {type(module) for module in mote.load(str(tiny), device="cpu").model.modules()}


def test_a_layer_with_hooks_or_a_replaced_forward_is_not_plain() -> None:
    layer = nn.Linear(3, 3)
    hooks: list[Any] = [layer.register_forward_hook, layer.register_forward_pre_hook]
    for register in hooks:
        handle: RemovableHandle = register(lambda *_: None)
        assert not is_plain(layer)
        handle.remove()
    assert is_plain(layer)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    assert not is_plain(layer) and is_linear(layer)
    assert not is_linear(nn.Bilinear(2, 2, 2))
