#!/usr/bin/env bash
# PEFT: `adapter_names` in a forward call is honoured by LoRA and silently ignored by the other methods.
#
# A good guess: `model(ids, adapter_names=["__base__"])` gives the base model's logits, or an error where a method cannot.
# What happens: with LoRA it does; IA3, LoHa, LoKr, VeRA and OFT take the argument and answer with the active adapter.
# What follows: a server that mixes users in one batch by `adapter_names` gives each of them the wrong model, without a word.
#
# Exits 1 when the behaviour is no longer the one described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.19.0 peft==0.21.2
cat > "$folder/show.py" <<'PY'
import peft
import torch
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, VeraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

print("peft", peft.__version__)


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    ).eval()


ids = torch.randint(3, 64, (1, 16), generator=torch.Generator().manual_seed(0))
methods = [
    LoraConfig(target_modules=["q_proj"], init_lora_weights=False),
    IA3Config(target_modules=["q_proj"], feedforward_modules=[], init_ia3_weights=False),
    LoHaConfig(target_modules=["q_proj"], init_weights=False),
    LoKrConfig(target_modules=["q_proj"], init_weights=False),
    VeraConfig(target_modules=["q_proj"], init_weights=False),
    OFTConfig(target_modules=["q_proj"], init_weights=False, oft_block_size=0, r=2),
]
honoured = {}
for config in methods:
    model = get_peft_model(llama(), config).eval()
    with torch.no_grad():
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.5)
        active = model(ids).logits
        with model.disable_adapter():
            base = model(ids).logits
        named = model(ids, adapter_names=["__base__"]).logits
    name = type(config).__name__
    honoured[name] = torch.equal(named, base)
    print(f"{name:12} differs from the base by {(active - base).abs().max():.2f}, "
          f"with adapter_names=['__base__'] by {(named - base).abs().max():.2f}")
    assert (active - base).abs().max() > 0.1
assert honoured.pop("LoraConfig")
assert not any(honoured.values()), honoured
PY
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/show.py"
