#!/usr/bin/env bash
# transformers: a causal 4-D mask handed to Gemma 3 switches its sliding windows off.
#
# A good guess: a 4-D mask that allows everything causal changes nothing: each layer combines it with its own window.
# What happens: every layer takes the mask as it is, and tokens beyond the window are seen; a dict of masks by layer type is right.
# What follows: masks for packing, prefix LM or step skipping silently train another model than the one that is served.
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
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

print("transformers", transformers.__version__)
WINDOW = 4
torch.manual_seed(0)
config = Gemma3TextConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, sliding_window=WINDOW, max_position_embeddings=128, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, attn_implementation="sdpa",
)
model = Gemma3ForCausalLM(config).eval()
ids = torch.randint(3, 64, (1, 24))
causal = torch.ones(24, 24, dtype=torch.bool).tril()
window = causal & ~torch.ones(24, 24, dtype=torch.bool).tril(-WINDOW)
with torch.no_grad():
    plain = model(ids).logits
    four_d = model(ids, attention_mask=causal[None, None]).logits
    by_type = model(
        ids, attention_mask={"full_attention": causal[None, None], "sliding_attention": window[None, None]}
    ).logits
lost = (four_d - plain).abs().max().item()
kept = (by_type - plain).abs().max().item()
print(f"causal 4-D mask against no mask: {lost:.3f}; a dict of masks by layer type against no mask: {kept:.1e}")
assert lost > 0.1 and kept < 1e-4
PY
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/show.py"
