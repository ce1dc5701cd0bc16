from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import tiny_llama
from support.windows import save_base
from transformers import DogeConfig, DogeForCausalLM, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mote.models.attention import GROUPED_SDPA, DocumentMask, grouped_sdpa
from mote.models.load import default_attention, load_base
from mote.tokens.masks import Layout, document_mask


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


def test_a_gpu_keeps_its_own_attention() -> None:
    assert default_attention("cuda:0") == "sdpa" and default_attention("cpu") == "grouped_sdpa"


@pytest.mark.parametrize("keep_window", [2048, 4])
def test_a_model_that_combines_masks_separates_documents(keep_window: int) -> None:
    """Doge adds a dynamic mask to the one it is given."""
    torch.manual_seed(0)
    config = DogeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, keep_window_size=keep_window, initializer_range=0.3,
    )  # fmt: skip
    model = DogeForCausalLM(config).eval()
    model.set_attn_implementation(GROUPED_SDPA)
    for name, parameter in model.named_parameters():
        if name.endswith(".A"):  # zero at first: a tie between all keys
            torch.nn.init.normal_(parameter)
    rows = [torch.randint(3, 60, (1, 7)), torch.randint(3, 60, (1, 9))]
    ids = torch.cat(rows, dim=1)
    documents = torch.tensor([[0] * 7 + [1] * 9])
    positions = torch.cat([torch.arange(7), torch.arange(9)])[None]
    visibility = torch.ones(1, 16, 4, dtype=torch.bool)
    mask = document_mask(Layout(torch.zeros_like(ids), visibility, documents))
    assert type(mask) is DocumentMask and type(mask[:, :, :, :5]) is torch.Tensor
    with torch.no_grad():
        packed = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        separate = torch.cat([model(input_ids=row).logits for row in rows], dim=1)
    torch.testing.assert_close(packed, separate, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "attention"), [("gemma2", "eager"), ("gemma3", GROUPED_SDPA)])
def test_soft_capped_scores_are_computed_by_eager(name: str, attention: str, tiny: Path, tmp_path: Path) -> None:
    """SDPA has no soft cap, and transformers up to 5.19 leaves it out without a word."""
    model = load_base(str(save_base(name, tiny, tmp_path)), device="cpu").model
    assert model.config._attn_implementation == attention


@torch.no_grad()
def test_prompt_in_an_empty_static_cache_is_plainly_causal() -> None:
    """There are more keys than queries then, and no mask: the first queries see the first keys."""
    model = tiny_llama()
    model.set_attn_implementation(GROUPED_SDPA)
    ids = torch.randint(1, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    cache = StaticCache(config=model.config, max_cache_len=16)
    found = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(found, model(input_ids=ids, use_cache=False).logits, atol=1e-5, rtol=0)
