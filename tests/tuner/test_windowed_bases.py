"""Packed rows through a plain call of an adapted model whose base has windows or chunks."""

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.adapters import config
from support.windows import REACH, VOCAB, tiny_base
from torch import Tensor

from mote.models.attention import GROUPED_SDPA

LENGTHS = (4 * REACH + 1, 3 * REACH, 2)


def adapted(name: str, attention: str, **changes: Any) -> Any:
    model = copy.deepcopy(tiny_base(name, **changes))
    model.set_attn_implementation(attention)
    torch.manual_seed(1)
    return get_peft_model(model, config()).eval()


def packed() -> tuple[list[Tensor], dict[str, Tensor]]:
    """Documents with steps, and one row of all of them."""
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randint(3, VOCAB, (length,), generator=generator) for length in LENGTHS]
    for part in parts[:2]:
        part[[4, 9, 13]] = torch.tensor([64, 66, 68])
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return parts, {"input_ids": torch.cat(parts)[None], "position_ids": positions}


@pytest.mark.parametrize("attention", ["eager", "sdpa", GROUPED_SDPA])
@pytest.mark.parametrize("given", ["position_ids", "document_ids", "padding"])
@pytest.mark.parametrize("name", ["gemma3", "llama4", "mistral"])
@torch.no_grad()
def test_packed_documents_equal_single_ones(name: str, given: str, attention: str) -> None:
    model = adapted(name, attention)
    parts, batch = packed()
    if given != "position_ids":
        del batch["position_ids"]
        batch["document_ids"] = torch.tensor([[d for d, part in enumerate(parts) for _ in part]])
    if given == "padding":
        batch = {key: torch.nn.functional.pad(value, (3, 0)) for key, value in batch.items()}
        batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) >= 3)[None].long()
    found = model(**batch).logits[0, -sum(LENGTHS) :].split(LENGTHS)
    model.base_model.model.set_attn_implementation("eager")
    for logits, part in zip(found, parts, strict=True):
        torch.testing.assert_close(logits, model(input_ids=part[None], use_cache=False).logits[0], atol=1e-5, rtol=0)


def test_rows_that_llama_4_scales_by_index_are_refused() -> None:
    model = adapted("llama4", "sdpa", floor_scale=sum(LENGTHS))
    parts, batch = packed()
    with pytest.raises(ValueError, match="index in its row from 45 tokens on; pack shorter rows, or give each"):
        model(**batch)
    model(input_ids=parts[0][None])


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("adapter", [True, False])
@torch.no_grad()
def test_last_logits_are_those_of_the_whole_row(adapter: bool, keep: int) -> None:
    """From transformers 5.24 on, Gemma 4 leaves other tokens out of the layers that share keys and values."""
    model = adapted("gemma4 with shared keys", GROUPED_SDPA)
    torch.manual_seed(2)
    for part, parameter in model.named_parameters():
        if ".mote_" in part:
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    ids = packed()[0][0][None]
    model = model if adapter else model.unload()
    whole = model(input_ids=ids, use_cache=False).logits
    last = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits
    torch.testing.assert_close(last, whole[:, -keep:], atol=1e-5, rtol=0)
