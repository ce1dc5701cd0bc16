"""Fused forms of the experts' matmul and of the marker rows against their reference implementations."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from mote.models.linear import fast_matmul
from mote.tuner.expert_weights import Route, active_columns
from mote.tuner.experts import Fused, add_experts, plain
from mote.tuner.marker_rows import PutLogits, put_embeddings, put_logits
from mote.tuner.step_runs import fold

WIDTH = 12  # three experts of rank 4


def tensors(dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (2, 5)) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=make, dtype=torch.float64).to(dtype)

    weights = random(*shape, WIDTH) * (torch.rand(*shape, WIDTH, generator=make) > 0.5)
    return {
        "x": random(*shape, 6), "result": random(*shape, 7), "first": random(WIDTH, 6), "second": random(7, WIDTH),
        "weights": weights.to(dtype),
    }  # fmt: skip


def with_gradients(function: Any, given: dict[str, Tensor], *more: Any) -> list[Tensor]:
    """Output and gradients, with `result` as the output of an operation, as a base layer's is."""
    leaves = {key: value.clone().requires_grad_(key != "weights") for key, value in given.items()}
    out = function(leaves["x"], leaves["result"] * 1.0, leaves["first"], leaves["second"], leaves["weights"], *more)
    grads = torch.autograd.grad(out.sin().sum(), [leaves[key] for key in ("x", "result", "first", "second")])
    return [out, *grads]


@pytest.mark.parametrize("shape", [(2, 5), (7,), (1, 1)])
@pytest.mark.parametrize("in_place", [True, False])
def test_fused_equals_plain(shape: tuple[int, ...], in_place: bool) -> None:
    given = tensors(shape=shape)
    for fast, slow in zip(
        with_gradients(Fused.apply, given, in_place), with_gradients(plain, given), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(fast, slow, atol=1e-12, rtol=1e-12)


def test_fused_gradients_are_the_numeric_ones() -> None:
    given = {key: value.requires_grad_(key != "weights") for key, value in tensors().items()}
    assert torch.autograd.gradcheck(
        lambda x, result, first, second, weights: Fused.apply(x, result * 1.0, first, second, weights, True),
        tuple(given.values()),
    )


def test_fused_computes_in_the_dtype_of_the_base_layer() -> None:
    given = {**(given := tensors(torch.float32)), "x": given["x"] * 0.05}  # sin must not magnify what is rounded
    low = {key: value.bfloat16() if key in ("x", "result", "weights") else value for key, value in given.items()}
    out, grad_x, grad_result, grad_first, grad_second = with_gradients(Fused.apply, low, True)
    assert out.dtype == grad_x.dtype == grad_result.dtype == torch.bfloat16
    assert grad_first.dtype == grad_second.dtype == torch.float32
    exact = with_gradients(plain, given)
    for found, wanted in zip([out, grad_x, grad_result, grad_first, grad_second], exact, strict=True):
        assert (found.float() - wanted).norm() < 0.03 * wanted.norm()


def test_a_second_derivative_is_refused() -> None:
    given = {key: value.requires_grad_(key != "weights") for key, value in tensors().items()}
    out = Fused.apply(*given.values(), False)
    (grad,) = torch.autograd.grad(out.sin().sum(), given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_only_what_the_gradients_need_is_saved() -> None:
    """The input, the expert weights and one hidden layer; no copy of the output or of the weighted hidden layer."""
    given = {key: value.requires_grad_(key != "weights") for key, value in tensors().items()}
    base = given["result"] * 1.0
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = Fused.apply(given["x"], base, given["first"], given["second"], given["weights"], True)
    assert out.data_ptr() == base.data_ptr()
    known = {given[key].data_ptr() for key in given}
    (hidden,) = [tensor for tensor in saved if tensor.data_ptr() not in known]
    assert hidden.shape == (10, WIDTH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_equals_plain(dtype: torch.dtype) -> None:
    given = tensors(torch.float32, (3, 1))
    table = torch.tensor([[0.1] * WIDTH, [0.5] * 4 + [0.0] * 4 + [1.5] * 4]).to(dtype)
    x = given["x"].to(dtype)
    result = given["result"].to(dtype)
    weights = table[1].expand(3, 1, WIDTH)
    a, b = fold(given["first"], given["second"], active_columns(table)[1], dtype)
    assert a.shape == (8, 6) and b.shape == (7, 8) and a.dtype == b.dtype == dtype
    expected = plain(x.float(), result.float(), given["first"], given["second"], weights.float())
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    found = result + linear(linear(x, a), b)
    torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("matmul", [linear, fast_matmul])
def test_fused_with_the_base_layer_equals_plain(matmul: Any, with_bias: bool, dtype: torch.dtype) -> None:
    given = tensors(dtype)
    frozen = torch.randn(7, 6, dtype=dtype)
    bias = torch.randn(7, dtype=dtype) if with_bias else None
    x, first, second = (given[key].requires_grad_() for key in ("x", "first", "second"))
    slow = plain(x, linear(x, frozen, bias), first, second, given["weights"])
    fast = Fused.apply(x, None, first, second, given["weights"], False, matmul, frozen, bias)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(fast, slow, atol=tolerance, rtol=tolerance)
    wanted = torch.autograd.grad(slow.sin().sum(), [x, first, second])
    for one, other in zip(torch.autograd.grad(fast.sin().sum(), [x, first, second]), wanted, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("matmul", [linear, fast_matmul])
@pytest.mark.parametrize("low", [False, True], ids=["one dtype", "experts in float32"])
@pytest.mark.parametrize("in_place", [True, False])
def test_no_gradients_need_no_autograd_function(
    monkeypatch: pytest.MonkeyPatch, in_place: bool, low: bool, matmul: Any
) -> None:
    monkeypatch.setattr(Fused, "apply", None)
    given = tensors(torch.float32)
    expected = plain(given["x"], given["result"], given["first"], given["second"], given["weights"])
    a, b = nn.Linear(6, WIDTH, bias=False), nn.Linear(WIDTH, 7, bias=False)
    a.weight, b.weight = nn.Parameter(given["first"]), nn.Parameter(given["second"])
    x, result = (given[name].bfloat16() if low else given[name] for name in ("x", "result"))
    with torch.no_grad():
        out = add_experts(x, result, a, b, Route(given["weights"]), in_place, matmul)
    assert out.dtype == x.dtype and (out is result) == in_place
    assert (out.float() - expected).norm() < (0.02 if low else 1e-6) * expected.norm()


@pytest.mark.parametrize("tokens", [3, 12])
def test_a_layer_with_other_tokens_than_the_model_is_refused(tokens: int) -> None:
    """Such as an output head that gets the last token alone: the step of its tokens is unknown."""
    given = tensors(torch.float32)
    table = torch.ones(2, WIDTH)
    first, second = nn.Linear(6, WIDTH, bias=False), nn.Linear(WIDTH, 7, bias=False)
    route = Route(given["weights"], active_columns(table))
    with pytest.raises(RuntimeError, match="shape"):
        add_experts(torch.zeros(1, tokens, 6), torch.zeros(1, tokens, 7), first, second, route, True)


class Gathered(nn.Parameter):
    """Stands for a weight that is whole only while its module is called."""


def test_sharded_weights_are_used_through_their_modules() -> None:
    given = tensors(torch.float32)
    first, second = nn.Linear(6, WIDTH, bias=False), nn.Linear(WIDTH, 7, bias=False)
    first.weight, second.weight = Gathered(given["first"]), Gathered(given["second"])
    called: list[nn.Module] = []
    for module in (first, second):
        module.register_forward_hook(lambda module, *_: called.append(module))
    found = add_experts(given["x"], given["result"].clone(), first, second, Route(given["weights"]), True)
    assert called == [first, second]
    torch.testing.assert_close(found, plain(*given.values()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_logits_of_trained_rows_equal_a_head_with_these_rows(bias: bool) -> None:
    make = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 4, generator=make).double()
    x = torch.randn(2, 5, 4, generator=make).double()
    ids = torch.tensor([7, 2])
    rows = torch.randn(2, 4, generator=make).double()
    offset = torch.randn(9, generator=make).double() if bias else None
    found = []
    for form in ("whole", "plain", "fast"):
        own_x = x.clone().requires_grad_()
        own_rows = rows.clone().requires_grad_()
        part = None if offset is None else offset[ids]
        if form == "whole":
            out = linear(own_x, weight.index_copy(0, ids, own_rows), offset)
        elif form == "plain":
            out = put_logits(linear(own_x, weight, offset), own_x, own_rows, part, ids)
        else:
            out = PutLogits.apply(linear(own_x, weight, offset), own_x, own_rows, weight[ids], part, ids)
        found.append([out, *torch.autograd.grad(out.sin().sum(), [own_x, own_rows])])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-12)


def test_marker_embeddings_equal_a_matrix_with_these_rows() -> None:
    make = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 4, generator=make)
    x = torch.randint(0, 9, (3, 20), generator=make)
    ids = torch.tensor([7, 2])
    rows = torch.randn(2, 4, generator=make).requires_grad_()
    whole = embedding(x, weight.index_copy(0, ids, rows))
    found = put_embeddings(embedding(x, weight), x, rows, ids)
    assert torch.equal(found, whole)
    (one,), (two,) = (torch.autograd.grad(out.sin().sum(), rows) for out in (found, whole))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_an_idle_expert_moves_by_momentum_only() -> None:
    """The experts share their matrices, so also the optimiser's step (docs/decisions/0003)."""
    torch.manual_seed(0)
    first, second = nn.Linear(6, WIDTH, bias=False), nn.Linear(WIDTH, 7, bias=False)
    optimizer = torch.optim.AdamW([first.weight, second.weight], lr=1e-2, weight_decay=0.0)
    start = first.weight.detach().clone()

    def step(expert: int) -> None:
        weights = torch.zeros(8, WIDTH)
        weights[:, expert * 4 : expert * 4 + 4] = 1.0
        x = torch.randn(8, 6)
        add_experts(x, torch.zeros(8, 7), first, second, Route(weights), True).sub(1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(5):
        step(0)
    seen = first.weight.detach().clone()
    for _ in range(50):
        step(1)
    idle = (first.weight.detach() - seen)[:4].abs()
    assert 0 < idle.max() < 10 * 1e-2  # beta1 = 0.9: no more than lr * 0.9 / (1 - 0.9) in all
    assert torch.equal(first.weight[8:], start[8:])
