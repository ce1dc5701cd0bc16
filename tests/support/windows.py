"""Tiny random base models whose layers have a sliding window or chunks, and chains longer than these."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from mote.tokens.encode import Tokens
from mote.tokens.packing import DrawnChain, unroll

REACH = 6  # tokens of a window or chunk
VOCAB = 60
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": None, "initializer_range": 0.2,
}  # fmt: skip
WINDOW = {"sliding_window": REACH}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}
GEMMA4 = {**MIXED, **PER_LAYER, "global_head_dim": 16, "initializer_range": 0.05}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere2": ("Cohere2Config", MIXED),
    "doge": ("DogeConfig", {**WINDOW, "keep_window_size": 9}),
    "exaone4": ("Exaone4Config", MIXED),
    "gemma2": ("Gemma2Config", {**MIXED, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", {**MIXED, "query_pre_attn_scalar": 8}),
    "gemma3n": (
        "Gemma3nTextConfig",
        {**MIXED, **PER_LAYER, "num_kv_shared_layers": 2, "altup_num_inputs": 2, "laurel_rank": 4},
    ),
    "gemma4": ("Gemma4TextConfig", GEMMA4),
    "gemma4 with shared keys": ("Gemma4TextConfig", {**GEMMA4, "num_kv_shared_layers": 2}),
    "llama4": (
        "Llama4TextConfig",
        {
            "attention_chunk_size": REACH, "no_rope_layer_interval": 2, "intermediate_size_mlp": 48,
            "num_local_experts": 2, "moe_layers": [],
        },
    ),
    "mistral": ("MistralConfig", WINDOW),
    "mixtral": ("MixtralConfig", {**WINDOW, "num_local_experts": 2}),
    "olmo3": ("Olmo3Config", MIXED),
    "phi3": ("Phi3Config", WINDOW),
    "qwen2": ("Qwen2Config", {**WINDOW, "use_sliding_window": True, "max_window_layers": 2}),
    "qwen2 with windows only": ("Qwen2Config", {**WINDOW, "use_sliding_window": True, "max_window_layers": 0}),
    "starcoder2": ("Starcoder2Config", WINDOW),
}  # fmt: skip


@cache
def tiny_base(name: str, **changes: Any) -> Any:
    """The model, in float32 and evaluation mode; parameters that begin as zeros or ones are random too."""
    kind, own = BASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**SMALL, **own, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if "q_norm" in part:
                parameter.mul_(0.3)  # sharp attention would magnify rounding errors
    return model


LENGTHS = {0: 5, 1: 7, 2: 9, 3: 8}  # tokens of the question and of each step, 3 being the last


def chain(*steps: int, seed: int = 0) -> Tokens:
    """A chain of the question and these steps, the same tokens in each chain of a seed."""
    generator = torch.Generator().manual_seed(seed)
    texts = {step: torch.randint(3, VOCAB, (length,), generator=generator).tolist() for step, length in LENGTHS.items()}
    present = (0, *steps)
    ids = [id_ for step in present for id_ in texts[step]]
    return Tokens(ids, ids, [step for step in present for _ in texts[step]])


def drawn(visibility: Tensor, *steps: int, seed: int = 0) -> DrawnChain:
    """`chain` with what its steps see (S, S)."""
    return DrawnChain(
        unroll(chain(*steps, seed=seed), torch.zeros_like(visibility, dtype=torch.float), 1), visibility, 1
    )


@torch.no_grad()
def plain_logits(model: Any, ids: list[int]) -> Tensor:
    """Logits (T, V) of a sequence alone, uncached, by the model's own masks and eager attention."""
    model.set_attn_implementation("eager")
    logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def save_base(name: str, tokenizer_folder: Path, folder: Path, **changes: Any) -> Path:
    """Write a tiny base model with a tokenizer that is already in a folder."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    tiny_base.__wrapped__(name, vocab_size=len(tokenizer), **ids, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
