"""The kernel that gives each token the columns of its own kind, against plain products."""

import ctypes
import shutil
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mote.vllm.kernel import OwnColumns, compiled

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")


class Part(NamedTuple):
    outputs: slice
    first: Tensor
    second: Tensor


@pytest.fixture(scope="module")
def kernel() -> ctypes.CDLL:
    return compiled()


def drawn_parts(columns: int, inputs: int, widths: list[int], gap: int) -> list[Part]:
    """Projections next to each other, with outputs between them that have no experts."""
    parts, begin = [], 0
    for width in widths:
        parts.append(Part(slice(begin, begin + width), torch.randn(columns, inputs), torch.randn(width, columns)))
        begin += width + gap
    return parts


def plain(out: Tensor, x: Tensor, parts: list[Part], gates: Tensor, kinds: Tensor) -> Tensor:
    """All columns for every token, times the gates of its kind; none for kind -1."""
    gate = torch.where(kinds[:, None] >= 0, gates[kinds.clamp_min(0)], 0)
    out = out.clone()
    for part in parts:
        out[:, part.outputs] += ((x @ part.first.T) * gate) @ part.second.T
    return out


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
@settings(max_examples=60, deadline=None)
@given(
    rank=st.sampled_from([1, 4, 16, 24]),
    inputs=st.sampled_from([1, 7, 48, 130]),
    widths=st.lists(st.sampled_from([1, 16, 40, 200]), min_size=1, max_size=3),
    gap=st.sampled_from([0, 3]),
    counts=st.lists(st.integers(0, 27), min_size=4, max_size=4),
    seed=st.integers(0, 100),
)
def test_equal_to_plain_products(
    threads: int,
    kernel: ctypes.CDLL,
    rank: int,
    inputs: int,
    widths: list[int],
    gap: int,
    counts: list[int],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    gates = torch.tensor([[0.5, 0, 0], [0, 2, -1], [0, 0, 0]]).repeat_interleave(rank, 1)  # the third has no columns
    parts = drawn_parts(3 * rank, inputs, widths, gap)
    kinds = torch.arange(-1, 3).repeat_interleave(torch.tensor(counts))[torch.randperm(sum(counts))]
    x, out = torch.randn(len(kinds), inputs), torch.randn(len(kinds), sum(widths) + gap * len(widths))
    expected = plain(out, x, parts, gates, kinds)
    rows = kinds.argsort(stable=True)[counts[0] :]  # tokens of kind -1 are not named
    starts = torch.tensor([0, *counts[1:]]).cumsum(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    OwnColumns(kernel, parts, gates).add(out, x, rows, starts)
    torch.set_num_threads(before)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(out[kinds == -1], expected[kinds == -1])


@needs_compiler
def test_inputs_may_lie_apart(kernel: ctypes.CDLL) -> None:
    parts, gates = drawn_parts(16, 32, [16], 0), torch.ones(1, 16)
    x, out = torch.randn(32, 5).T, torch.zeros(5, 16)
    OwnColumns(kernel, parts, gates).add(out, x, torch.arange(5), torch.tensor([0, 5]))
    torch.testing.assert_close(out, x @ parts[0].first.T @ parts[0].second.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("compiler", "why"), [("no-such-compiler -O2", "No such file"), ("false", "failed")])
def test_without_a_compiler_it_says_so(compiler: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(RuntimeError, match=f"^CXX={compiler}: {why}.*; install g\\+\\+, or name a C\\+\\+ compiler"):
        compiled()
