"""Adapters to export, and the command that exports them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from mote import cli
from mote.models.load import fingerprint, load_tokenizer
from mote.tokens.encode import add_markers
from mote.tuner import MoteConfig
from support.tiny import make_tiny_model


def make_base(kind: str, folder: Path) -> Path:
    make_tiny_model(folder, tied=kind != "untied")
    if kind == "gpt2":
        rows = len(AutoTokenizer.from_pretrained(folder))
        torch.manual_seed(0)
        GPT2LMHeadModel(
            GPT2Config(vocab_size=rows, n_embd=32, n_layer=2, n_head=2, n_positions=128, initializer_range=0.3,
                       bos_token_id=2, eos_token_id=2)
        ).save_pretrained(folder)  # fmt: skip
    return folder


def make_adapter(base_folder: Path, folder: Path, **changes: Any) -> Path:
    """An adapter of which every part is random."""
    torch.manual_seed(1)
    tokenizer = load_tokenizer(str(base_folder))
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    config = MoteConfig(**{"r": 4, "lora_alpha": 8, "init_weights": False, **changes})
    add_markers(tokenizer, config, base)
    config.base_fingerprint = fingerprint(base)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: Any, ids: Tensor, **more: Any) -> Tensor:
    out: Tensor = model.eval()(input_ids=ids, **more).logits
    return out


# --- the command


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run `mote export ARGUMENTS` in this process: the exit code."""
    monkeypatch.setattr("sys.argv", ["mote", "export", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0
