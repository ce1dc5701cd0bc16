#!/usr/bin/env bash
# transformers: with Gemma 4, `logits_to_keep=2` gives other logits than the last two of the row, under a registered attention.
#
# A good guess: `logits_to_keep` only chooses which logits are computed, whatever attention is registered.
# What happens: layers that share keys get the last tokens only, with mask None and `is_causal`, which then counts from the row's
# beginning; transformers avoids it for the attention named "sdpa", but its own function under another name is wrong.
# What follows: assisted generation and scoring of the last tokens change silently under kernels registered by other packages;
# hooks and adapters on these layers see the last tokens only.
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
from transformers import AttentionInterface, AttentionMaskInterface, Gemma4ForCausalLM, Gemma4TextConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

print("transformers", transformers.__version__)
AttentionInterface.register("same_as_sdpa", sdpa_attention_forward)
AttentionMaskInterface.register("same_as_sdpa", sdpa_mask)
torch.manual_seed(0)
config = Gemma4TextConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, global_head_dim=16, sliding_window=128, num_kv_shared_layers=2,
    layer_types=["sliding_attention", "full_attention"] * 2, max_position_embeddings=128, pad_token_id=0,
    hidden_size_per_layer_input=8, vocab_size_per_layer_input=64,
)
model = Gemma4ForCausalLM(config).eval()
ids = torch.randint(3, 64, (1, 24))
changed = {}
for name in ("eager", "sdpa", "same_as_sdpa"):
    model.set_attn_implementation(name)
    with torch.no_grad():
        whole = model(ids).logits
        for keep in (1, 2):
            last = model(ids, logits_to_keep=keep).logits
            changed[name, keep] = (last - whole[:, -keep:]).abs().max().item()
            print(f"{name}, logits_to_keep={keep}: {changed[name, keep]:.1e} from the last logits of the whole row")
assert changed["same_as_sdpa", 2] > 0.1
assert max(value for case, value in changed.items() if case != ("same_as_sdpa", 2)) < 1e-5
PY
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/show.py"
