#!/usr/bin/env bash
# transformers: with longrope (Phi-3) the logits of a short sequence depend on how long its neighbour in the batch is.
#
# A good guess: rows of a batch are independent of each other.
# What happens: the rope factors are chosen once for the batch, by its longest row: beside a long row a short one is computed with the long factors.
# What follows: batched evaluation, continuous batching and padding to a fixed length change answers; group rows by regime.
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
from transformers import Phi3Config, Phi3ForCausalLM

print("transformers", transformers.__version__)
SHORT, LONG, ORIGINAL = 16, 56, 32
torch.manual_seed(0)
config = Phi3Config(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    max_position_embeddings=128, original_max_position_embeddings=ORIGINAL,
    rope_parameters={
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
        "factor": 4.0, "original_max_position_embeddings": ORIGINAL,
    },
)
model = Phi3ForCausalLM(config).eval()
ids = torch.randint(3, 64, (2, LONG))
mask = torch.ones_like(ids)
mask[0, SHORT:] = 0  # right padding: causal attention never reaches it from the short row's tokens
with torch.no_grad():
    alone = model(ids[:1, :SHORT]).logits[0]
    beside_long = model(ids, attention_mask=mask).logits[0, :SHORT]
    beside_short = model(ids[:, :SHORT], attention_mask=mask[:, :SHORT]).logits[0]
moved = (beside_long - alone).abs().max().item()
still = (beside_short - alone).abs().max().item()
print(f"{SHORT} tokens against the same alone: {moved:.3f} beside {LONG} tokens, {still:.1e} beside {SHORT}")
assert moved > 0.1 and still < 1e-4
PY
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/show.py"
