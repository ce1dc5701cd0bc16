#!/usr/bin/env bash
# transformers: LFM2 takes a 4-D block-diagonal mask, and its convolution layers read across the blocks all the same.
#
# A good guess: a model that accepts a 4-D attention mask without an error keeps masked tokens apart, or refuses.
# What happens: attention layers obey the mask, convolution layers have no use for it: the second document's first tokens depend on the first.
# What follows: sequence packing by mask on hybrid models leaks between documents without an error.
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
from transformers import Lfm2Config, Lfm2ForCausalLM

print("transformers", transformers.__version__)
torch.manual_seed(0)
config = Lfm2Config(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
    num_key_value_heads=1, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    layer_types=["conv", "full_attention", "conv", "full_attention"],
)
model = Lfm2ForCausalLM(config).eval()
ids = torch.randint(3, 64, (1, 24))
mask = torch.ones(24, 24, dtype=torch.bool).tril()
mask[12:, :12] = False  # two documents of 12 tokens
positions = torch.arange(12).repeat(2)[None]
other = ids.clone()
other[:, :12] = (other[:, :12] + 7) % 60 + 3  # another first document
with torch.no_grad():
    one = model(ids, attention_mask=mask[None, None], position_ids=positions, use_cache=False).logits[0, 12:]
    two = model(other, attention_mask=mask[None, None], position_ids=positions, use_cache=False).logits[0, 12:]
leak = (one - two).abs().amax(dim=-1)
print("change of the second document's logits when the first is another:", [round(x, 2) for x in leak.tolist()])
assert leak[0] > 0.01
PY
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/show.py"
