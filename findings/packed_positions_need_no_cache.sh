#!/usr/bin/env bash
# transformers: restarting `position_ids` keep packed documents apart only when no cache is made, and a cache is the default.
#
# A good guess: rows as `DataCollatorWithFlattening` makes them (positions that begin again, no mask) behave alike in every call.
# What happens: `model(**batch)` makes a cache, takes the plain causal mask, and the second document reads the first; `use_cache=False` is right.
# What follows: an evaluation loop over packed rows reports losses of documents that see each other; `Trainer` is safe while it trains.
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
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

print("transformers", transformers.__version__)


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    ).eval()


model = llama()
first, second = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0)).tolist()
batch = DataCollatorWithFlattening()([{"input_ids": first}, {"input_ids": second}])
given = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
with torch.no_grad():
    alone = model(torch.tensor([second])).logits[0]
    default = model(**given).logits[0, 12:]
    no_cache = model(**given, use_cache=False).logits[0, 12:]
print(f"the second document against itself alone: {(default - alone).abs().max():.3f} by default, "
      f"{(no_cache - alone).abs().max():.1e} with use_cache=False")
assert (default - alone).abs().max() > 0.1
assert (no_cache - alone).abs().max() < 1e-4
PY
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/show.py"
