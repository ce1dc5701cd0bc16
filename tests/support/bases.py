"""Tiny bases of other architectures with the tiny model's tokenizer."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GraniteMoeHybridConfig

HYBRID_TARGETS = ["in_proj", "q_proj", "k_proj", "v_proj", "o_proj"]


def make_hybrid_model(tiny: Path, folder: Path) -> Path:
    """A Granite 4 hybrid: a state-space layer and an attention layer, with random norms and strong weights."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    config: Any = GraniteMoeHybridConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["mamba", "attention"], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8,
        mamba_n_groups=1, mamba_chunk_size=8, num_local_experts=0, shared_intermediate_size=32, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
