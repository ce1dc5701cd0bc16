"""Merged step experts compute what the reference implementation computes."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
pytestmark = pytest.mark.vllm

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.distributed import (  # noqa: E402
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.model_executor.layers.linear import MergedColumnParallelLinear  # noqa: E402

from mote.serve.vllm import experts, merged  # noqa: E402
from mote.serve.vllm.models import mergeable  # noqa: E402

RANK = 4
INPUTS = 32
WIDTHS = [48, 16]
STEPS = {
    "question": [0] * 9,
    "one step": [2] * 9,
    "all steps": [1, 2, 3, 2, 1, 3, 3, 1, 2],
    "prompts among steps": [0, 1, 1, 0, 0, 3, 2, 0, 0],
    "base": [4] * 9,
    "everything": [0, 4, 1, 4, 0, 2, 3, 3, 0],
}
TABLES = {
    "mean": [[0.5, 1 / 6, 1 / 6, 1 / 6], [0.5, 0.5, 0, 0], [0.5, 0, 0.5, 0], [0.5, 0, 0, 0.5], [0, 0, 0, 0]],
    "one reads the question": [[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]],
}


def table_of(name: str) -> Tensor:
    return torch.tensor(TABLES[name], dtype=torch.float32).repeat_interleave(RANK, dim=1)


def pairs_of(places: list[int]) -> dict[int, experts.Pair]:
    return {place: (torch.randn(4 * RANK, INPUTS), torch.randn(WIDTHS[place], 4 * RANK)) for place in places}


def loaded(layer: MergedColumnParallelLinear) -> MergedColumnParallelLinear:
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def outputs(layer: MergedColumnParallelLinear, x: Tensor) -> Tensor:
    return layer(x)[0]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmConfig]:
    """vLLM's layers need a process group, here of one process."""
    made = VllmConfig()
    meeting = tmp_path_factory.mktemp("group") / "meeting"
    with set_current_vllm_config(made):
        init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
        initialize_model_parallel(1)
    yield made
    cleanup_dist_env_and_memory()


def make_layer(settings: VllmConfig, bias: bool = False) -> MergedColumnParallelLinear:
    """A layer with fixed random weights."""
    with set_current_vllm_config(settings):
        made = MergedColumnParallelLinear(INPUTS, WIDTHS, bias=bias, params_dtype=torch.float32)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    return made


@pytest.mark.parametrize("places", [[0, 1], [1]], ids=["both projections", "the second"])
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("batch", STEPS)
def test_merged_experts_equal_the_reference(batch: str, table: str, places: list[int], settings: VllmConfig) -> None:
    pairs = pairs_of(places)
    layer = make_layer(settings)
    plain = make_layer(settings)
    weights = experts.ExpertWeights(table_of(table), max_tokens=16)
    experts.add_experts(plain, pairs, weights)
    differences = merged.MergedExpertWeights(table_of(table))
    merged.add_experts(layer, "layer", pairs, differences, {})
    steps = torch.tensor(STEPS[batch])
    x = torch.randn(9, INPUTS)
    weights.set(steps)
    differences.set(steps)
    expected = outputs(loaded(plain), x)
    torch.testing.assert_close(outputs(loaded(layer), x), expected, atol=1e-4, rtol=1e-4)
    weights.set(torch.full_like(steps, 4))
    assert (outputs(plain, x) - expected).abs().max() > 1 or batch == "base"  # the experts have an effect


def test_prompts_need_no_difference_and_steps_no_shared_one() -> None:
    weights = merged.MergedExpertWeights(table_of("mean"))
    weights.set(torch.tensor([0, 0, 0]))
    assert not weights.differences
    weights.set(torch.tensor([0, 2, 0, 1]))
    assert weights.rows is not None and weights.rows.tolist() == [1, 3]
    assert [difference.shape for difference in weights.differences] == [(2, 1, 3 * RANK)]
    weights.set(torch.tensor([2, 4]))
    assert weights.rows is None and [difference.shape for difference in weights.differences] == [
        (2, 1, 3 * RANK),
        (2, 1, RANK),
    ]


@pytest.mark.parametrize(
    ("device", "dtype", "quantised", "expected"),
    [
        ("cpu", torch.float32, None, True),
        ("cpu", torch.bfloat16, None, False),
        ("cpu", torch.float32, "awq", False),
        ("cuda", torch.float32, None, False),
    ],
)
def test_only_float32_weights_on_a_cpu_are_merged(
    device: str, dtype: torch.dtype, quantised: Any, expected: bool
) -> None:
    settings = SimpleNamespace(
        model_config=SimpleNamespace(dtype=dtype),
        device_config=SimpleNamespace(device=torch.device(device)),
        quant_config=quantised,
    )
    assert mergeable(settings) == expected
