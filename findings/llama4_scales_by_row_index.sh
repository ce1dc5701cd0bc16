#!/usr/bin/env bash
# transformers: Llama 4 scales attention by a token's index in its row, not by its position.
#
# A good guess: `position_ids` say where a token is, so packed and left-padded rows equal rows alone.
# What happens: layers without rotary embeddings scale queries by the row index, from `floor_scale` (8192) tokens on; neither
#   `position_ids` nor the padding mask enters.
# What follows: in long packed or left-padded rows the same text gets other logits, in training and in batched `generate`.
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
from transformers import Llama4ForCausalLM, Llama4TextConfig

print("transformers", transformers.__version__)


def against_alone(floor_scale):
    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, no_rope_layer_interval=2, moe_layers=[],
        floor_scale=floor_scale, attn_scale=3.0, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )
    model = Llama4ForCausalLM(config).eval()
    ids = torch.randint(3, 64, (1, 12))
    padded = torch.cat([torch.zeros(1, 12, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(24) >= 12).long()[None]
    positions = (torch.arange(24) - 12).clamp(min=0)[None]
    packed = torch.arange(12).repeat(2)[None]
    with torch.no_grad():
        alone = model(ids, use_cache=False).logits
        left = model(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 12:]
        second = model(torch.cat([ids, ids], 1), position_ids=packed, use_cache=False).logits[:, 12:]
    return (left - alone).abs().max().item(), (second - alone).abs().max().item()


beyond, within = against_alone(4), against_alone(100)
print("left-padded and packed against alone, rows beyond floor_scale: %.3f, %.3f" % beyond)
print("left-padded and packed against alone, rows within it: %.1e, %.1e" % within)
assert min(beyond) > 0.1 and max(within) < 1e-4
PY
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/show.py"
