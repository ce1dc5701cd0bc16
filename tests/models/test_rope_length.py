"""From which length on a base model's rotary frequencies depend on the longest sequence of a forward pass."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.training import trained
from support.windows import save_base, tiny_base

from mote import MoteConfig
from mote.core.errors import UserError
from mote.models.rope import LengthDependentRope, original_length

LONG = 24  # tokens with the original frequencies
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
    "original_max_position_embeddings": LONG,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": LONG}),
    "dynamic": ("mistral", {"rope_parameters": DYNAMIC, "max_position_embeddings": LONG}),
    "of each kind": (
        "gemma3",
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": DYNAMIC,
            },
            "max_position_embeddings": LONG,
        },
    ),
}


def base(case: str, **changes: Any) -> Any:
    name, rope = CASES[case]
    return tiny_base.__wrapped__(name, **rope, **changes)  # frequencies change with use: no shared one


@pytest.mark.parametrize("case", CASES)
def test_the_length_in_the_config_is_where_logits_change(case: str) -> None:
    model = base(case, sliding_window=None) if case != "of each kind" else base(case)
    assert original_length(model.config) == LONG
    assert LengthDependentRope(model).is_short(LONG) and not LengthDependentRope(model).is_short(LONG + 1)
    ids = torch.randint(3, 60, (1, LONG + 1), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        short = model(ids[:, :LONG], use_cache=False).logits
        long = model(ids, use_cache=False).logits[:, :LONG]
    assert (short - long).abs().max() > 1e-3


def test_other_rotary_embeddings_have_no_such_length() -> None:
    assert original_length(tiny_base("qwen2").config) is None
    assert original_length(tiny_base("gemma3").config) is None


@pytest.mark.parametrize("settings", [{}, {"packing": True}], ids=str)
def test_chains_beyond_the_original_frequencies_are_refused(
    settings: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    name, rope = CASES["longrope"]
    folder = save_base(name, tiny, tmp_path / "base", **rope)
    with pytest.raises(UserError, match=r"train\.max_length=2048: .* a chain has \d+ tokens; train\.max_length=24"):
        trained(folder, tmp_path / "run", **settings)


def test_packed_documents_beyond_the_original_length_are_refused() -> None:
    model = get_peft_model(base("longrope"), MoteConfig(r=2, target_modules=["o_proj"]))
    ids = torch.randint(3, 60, (1, 2 * LONG + 1), generator=torch.Generator().manual_seed(0))
    steps = torch.ones_like(ids)
    fits = torch.tensor([[0] * LONG + [1] * LONG])
    model(input_ids=ids[:, :-1], document_ids=fits, step_ids=steps[:, :-1])
    with pytest.raises(ValueError, match=r"document_ids: a document is longer than 24 tokens, .* a separate forward"):
        model(input_ids=ids, document_ids=torch.tensor([[0] * LONG + [1] * (LONG + 1)]), step_ids=steps)
