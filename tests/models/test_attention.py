from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mote.models.attention import grouped_sdpa
from mote.models.load import default_attention


class Layer(torch.nn.Module):
    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize("masked", ["no", "bool", "float"])
def test_outputs_and_gradients_equal_transformers(groups: int, queries: int, masked: str) -> None:
    torch.manual_seed(0)
    shape = {"q": (2, 2 * groups, queries, 8), "k": (2, 2, 7, 8), "v": (2, 2, 7, 8)}
    if masked == "no" and queries == 1:
        shape |= {"k": (2, 2, 7, 8)}
    mask: Any = None
    if masked != "no":
        seen = torch.rand(2, 1, queries, 7) > 0.3
        seen[..., 0] = True
        mask = seen if masked == "bool" else torch.zeros(2, 1, queries, 7).masked_fill(~seen, -1e9)
    weights = torch.randn(2, queries, 2 * groups, 8)
    results = []
    for attention in (sdpa_attention_forward, grouped_sdpa):
        torch.manual_seed(1)
        q, k, v = (torch.randn(shape[name], requires_grad=True) for name in "qkv")
        out, _ = attention(Layer(groups), q, k, v, mask, scaling=0.3)
        (out * weights).sum().backward()
        results.append([out, q.grad, k.grad, v.grad])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_gpu_keeps_its_own() -> None:
    assert default_attention("cuda:0") == "sdpa" and default_attention("cpu") == "grouped_sdpa"
