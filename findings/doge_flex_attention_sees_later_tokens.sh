#!/usr/bin/env bash
# transformers: Doge under FlexAttention attends to later tokens.
#
# A good guess: an attention implementation changes speed and rounding, nothing else.
# What happens: Doge adds its learnt bias to the mask, but not to a `BlockMask`, and hands on the bias alone: no causal mask is left.
# What follows: training looks very good (the model reads the answer), and what is generated is noise; `eager` and `sdpa` are right.
#
# Exits 1 when the behaviour is no longer the one described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0
cat > "$folder/show.py" <<'PY'
import torch
import transformers
from transformers import DogeConfig, DogeForCausalLM

print("transformers", transformers.__version__)
torch.manual_seed(0)
config = DogeConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.3,
)
model = DogeForCausalLM(config).eval()
ids = torch.randint(3, 64, (1, 12))
other = ids.clone()
other[0, -1] = (ids[0, -1] + 1) % 64
change = {}
with torch.no_grad(), torch.compiler.set_stance("force_eager"):
    for attention in ("eager", "sdpa", "flex_attention"):
        model.set_attn_implementation(attention)
        change[attention] = (model(ids).logits - model(other).logits)[0, :-1].abs().max().item()
        print(f"{attention}: another last token changes the logits before it by {change[attention]:.3f}")
assert change["eager"] == change["sdpa"] == 0 and change["flex_attention"] > 0.1
PY
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/show.py"
