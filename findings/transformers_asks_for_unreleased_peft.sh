#!/usr/bin/env bash
# transformers + PEFT: `model.add_adapter` of transformers 5.24 refuses every PEFT on PyPI; it asks for 0.22, the newest is 0.21.2.
#
# A good guess: the newest transformers and the newest PEFT work together, in all ways that both document.
# What happens: add_adapter, load_adapter and set_adapter of transformers' own models raise ValueError; get_peft_model works.
# What follows: code that loads LoRAs through transformers breaks on an upgrade of transformers alone; pip sees no conflict.
#
# Exits 1 when the behaviour is no longer the one described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 peft
cat > "$folder/show.py" <<'PY'
import peft
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

print("transformers", transformers.__version__, "peft", peft.__version__, "(the newest)")
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
)
try:
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    refused = ""
except ValueError as error:
    refused = str(error)
print("model.add_adapter:", refused or "works")
get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
print("get_peft_model: works")
assert ">= 0.22" in refused
PY
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/show.py"
