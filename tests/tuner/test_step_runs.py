"""The experts' output run by run against the plain form, and which rows take it."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adapters import adapted, some_ids
from torch import Tensor
from torch.nn.functional import linear

from mote.tokens.routing import NO_STEP
from mote.tuner import expert_weights, experts
from mote.tuner.expert_weights import Run, _faster_runs, active_columns
from mote.tuner.experts import plain
from mote.tuner.step_runs import FusedByRun

WIDTH = 12  # three experts of rank 4
TABLE = torch.tensor([[0.1] * WIDTH, [0.5] * 4 + [1.5] * 4 + [0.0] * 4, [0.5] * 4 + [0.0] * 4 + [1.5] * 4]).double()
COLUMNS = active_columns(TABLE)
STEPS = torch.tensor([[0, 0, 1, 1, 1], [1, NO_STEP, NO_STEP, 2, 2]])
RUNS = [Run(0, 2, 0), Run(2, 6, 1), Run(8, 10, 2)]


def leaves(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 5, 6), "result": (2, 5, 7), "lora_A": (WIDTH, 6), "lora_B": (7, WIDTH)}
    return {
        name: torch.randn(shape, generator=make, dtype=torch.float64).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def weights() -> Tensor:
    return torch.cat([TABLE, TABLE.new_zeros(1, WIDTH)])[STEPS]


@pytest.mark.parametrize("in_place", [True, False])
def test_run_by_run_equals_plain(in_place: bool) -> None:
    found = []
    for by_run in (True, False):
        given = leaves()
        x, a, b = (given[name] for name in ("x", "lora_A", "lora_B"))
        result = given["result"] * 1.0
        if by_run:
            out = FusedByRun.apply(x, result, a, b, RUNS, COLUMNS, in_place)
            assert (out.data_ptr() == result.data_ptr()) == in_place
        else:
            out = plain(x, result, a, b, weights())
        found.append([out, *torch.autograd.grad(out.sin().sum(), list(given.values()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_run_by_run_with_the_base_layer_equals_plain(bias: bool) -> None:
    frozen = torch.randn(7, 6)
    offset = torch.randn(7) if bias else None
    found = []
    for by_run in (True, False):
        given = leaves(torch.float32)
        x, a, b = (given[name] for name in ("x", "lora_A", "lora_B"))
        if by_run:
            out = FusedByRun.apply(x, None, a, b, RUNS, COLUMNS, False, frozen, offset)
        else:
            out = plain(x, linear(x, frozen, offset), a, b, weights().float())
        found.append([out, *torch.autograd.grad(out.sin().sum(), [x, a, b])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_each_run_saves_the_hidden_values_of_its_own_columns() -> None:
    given = leaves()
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        x, a, b = (given[name] for name in ("x", "lora_A", "lora_B"))
        FusedByRun.apply(x, given["result"] * 1.0, a, b, RUNS, COLUMNS, True)
    known = {tensor.data_ptr() for tensor in given.values()}
    assert [tuple(t.shape) for t in saved if t.data_ptr() not in known] == [(2, WIDTH), (4, 8), (2, 8)]


@pytest.mark.parametrize("changes", [{}, {"mix": 1.0}, {"draw_question_expert": False}], ids=str)
def test_a_training_step_has_the_gradients_of_the_whole_form(changes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = some_ids()
    found = []
    calls: list[int] = []
    apply = FusedByRun.apply
    monkeypatch.setattr(experts.FusedByRun, "apply", lambda *given: calls.append(1) or apply(*given))
    for cost in (0, 1000):
        monkeypatch.setattr(expert_weights, "_RUN_COST", cost)
        model = adapted(**changes).train()
        before = len(calls)
        loss = model(input_ids=ids, labels=ids, question_experts=torch.tensor([1, 2, 3])).loss
        assert len(calls) - before == (14 if cost == 0 else 0)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found.append([loss, *torch.autograd.grad(loss, trained)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@given(st.lists(st.lists(st.integers(NO_STEP, 2), min_size=8, max_size=8), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_runs_hold_every_token_with_a_step_once(rows: list[list[int]]) -> None:
    before = expert_weights._RUN_COST
    expert_weights._RUN_COST = 0
    try:
        runs = _faster_runs(torch.tensor(rows), COLUMNS, WIDTH + 1)
    finally:
        expert_weights._RUN_COST = before
    flat = torch.tensor(rows).flatten()
    found = torch.full_like(flat, NO_STEP)
    for run in runs:
        assert run.start < run.stop
        assert bool((found[run.start : run.stop] == NO_STEP).all())
        found[run.start : run.stop] = run.step
    assert torch.equal(found, flat)


def test_short_runs_and_means_of_all_experts_take_the_whole_form() -> None:
    long = torch.tensor([1, 2]).repeat_interleave(200)[None]
    assert _faster_runs(long, COLUMNS, WIDTH) == [Run(0, 200, 1), Run(200, 400, 2)]
    assert not _faster_runs(torch.tensor([1, 2]).repeat(200)[None], COLUMNS, WIDTH)
    assert not _faster_runs(torch.zeros_like(long), COLUMNS, WIDTH)
