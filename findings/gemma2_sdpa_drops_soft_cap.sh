#!/usr/bin/env bash
# transformers up to 5.19: Gemma 2 loads with SDPA by default, which leaves out the soft cap on attention scores.
#
# A good guess: `from_pretrained` chooses an attention that computes the model of the configuration (`attn_logit_softcapping=50`).
# What happens: SDPA ignores the cap without a word; `eager` and FlexAttention apply it. 5.24 refuses SDPA and loads `eager`.
# What follows: a checkpoint is trained as another model than one that is served with the cap, or with a later release.
#
# Exits 1 when the behaviour is no longer the one described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.19.0
cat > "$folder/show.py" <<'PY'
import torch
import transformers
from transformers import AutoModelForCausalLM, Gemma2Config

print("transformers", transformers.__version__)
torch.manual_seed(0)
config = Gemma2Config(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, attn_logit_softcapping=1.0, initializer_range=0.3,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
model = AutoModelForCausalLM.from_config(config).eval()
chosen = model.config._attn_implementation
ids = torch.randint(3, 64, (1, 12))
with torch.no_grad():
    default = model(ids).logits
    model.set_attn_implementation("eager")
    capped = model(ids).logits
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    uncapped = model(ids).logits
print(f"chosen: {chosen}; against eager with the cap: {(default - capped).abs().max():.3f}, "
      f"without it: {(default - uncapped).abs().max():.1e}")
assert chosen == "sdpa"
assert (default - capped).abs().max() > 0.1 and (default - uncapped).abs().max() < 1e-4
PY
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/show.py"
