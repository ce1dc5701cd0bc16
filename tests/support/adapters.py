"""Tiny models with step experts, in memory and as adapter folders."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import mote
from mote.inference.model import Model
from mote.models.load import fingerprint, load_base
from mote.tokens.encode import add_markers
from mote.tuner import MoteConfig

MARKERS = {"analysis": [64, 65], "guidance": [66, 67], "response": [68, 69]}


def tiny_llama(tied: bool = True, vocab: int = 64) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def config(**changes: Any) -> MoteConfig:
    given: dict[str, Any] = {"r": 4, "lora_alpha": 8, "markers": MARKERS, "turn_ids": [2], "vocab_size": 70}
    return MoteConfig(**{**given, "init_weights": False, **changes})


def adapted(tied: bool = True, **changes: Any) -> Any:
    torch.manual_seed(1)
    model = get_peft_model(tiny_llama(tied), config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens" in name:
                parameter.add_(torch.randn_like(parameter))
    return model.eval()


def some_ids(rows: int = 3, length: int = 24) -> Tensor:
    """Rows whose steps begin at different places; the last has no step at all, one goes back to the question."""
    ids = torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(2))
    ids[0, 5], ids[0, 12], ids[0, 17] = 64, 66, 68
    ids[1, 9], ids[1, 15] = 68, 2
    return ids


QUESTIONS = ["how do I kill a process", "safe?", "how do I answer on my computer when it is unsafe to do so"]


def save_random_adapter(tiny: Path, folder: Path, seed: int = 5, **settings: Any) -> Path:
    base = load_base(str(tiny), device="cpu")
    config = MoteConfig(r=4, init_weights=False, base_fingerprint=fingerprint(base.model), **settings)
    add_markers(base.tokenizer, config, base.model)
    torch.manual_seed(seed)
    model = get_peft_model(base.model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_adapter(tiny, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def model(tiny: Path, adapter: Path) -> Model:
    return mote.load(str(tiny), adapter, device="cpu")
