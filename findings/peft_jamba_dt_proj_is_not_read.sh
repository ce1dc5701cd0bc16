#!/usr/bin/env bash
# PEFT: LoRA with target_modules="all-linear" puts an adapter on Jamba's dt_proj that nothing reads.
#
# A good guess: every adapter that PEFT counts as trainable is trained; layers that Mamba's kernels read past their module are refused.
# What happens: Jamba computes `self.dt_proj.weight @ ...`, past the module. PEFT refuses such layers by a list of model types, and only
#   `out_proj` and `conv1d`; Jamba is not in it. The adapter gets no gradient, and changing it changes no logit.
# What follows: trainable parameters are counted and saved that do nothing; Bamba's out_proj under the fused kernel is the same kind.
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
import transformers
from peft import LoraConfig, get_peft_model
from transformers import JambaConfig, JambaForCausalLM

print("peft", peft.__version__, "transformers", transformers.__version__)
torch.manual_seed(0)
config = JambaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, num_experts=1, mamba_d_state=8, mamba_dt_rank=4,
    use_mamba_kernels=False, pad_token_id=0,
)
lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
model = get_peft_model(JambaForCausalLM(config), lora)
ids = torch.randint(1, 64, (1, 12))
model(input_ids=ids, labels=ids).loss.backward()
model.eval()
with torch.no_grad():
    before = model(input_ids=ids).logits
    for name, layer in model.named_modules():
        if name.endswith(("dt_proj.lora_B.default", "x_proj.lora_B.default")):
            gradient = layer.weight.grad
            kept = layer.weight.clone()
            layer.weight.add_(1)
            change = (model(input_ids=ids).logits - before).abs().max().item()
            layer.weight.copy_(kept)
            print(f"{name.split('.')[-3]}: gradient {None if gradient is None else 'there'}, another adapter changes {change:.3f}")
            assert (gradient is None and change == 0) == ("dt_proj" in name)
PY
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/show.py"
