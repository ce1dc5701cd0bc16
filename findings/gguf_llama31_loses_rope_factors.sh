#!/usr/bin/env bash
# transformers: a GGUF file of Llama 3.1 or 3.2 is loaded with the plain rotary embedding; its rope factors are dropped without a word.
#
# A good guess: `from_pretrained(gguf_file=...)` gives the model of the file, which llama.cpp runs.
# What happens: a converter writes the `llama3` scaling as the tensor `rope_freqs.weight`; the loader skips it and sets `rope_type: default`.
# What follows: dequantising such a file for fine-tuning trains another model: short texts look right, logits drift with the position, and
# an adapter trained so is served with other positions than it learned. Copy `rope_parameters` from the original `config.json`.
#
# Exits 1 when the behaviour is no longer the one described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0
cat > "$folder/show.py" <<'PY'
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

print("transformers", transformers.__version__)
HEADS, LAYERS, WIDTH, VOCAB, THETA = 4, 2, 64, 64, 500000.0
torch.manual_seed(0)
scaling = {  # as in Llama 3.1
    "rope_type": "llama3", "rope_theta": THETA, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
config = LlamaConfig(
    vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
    num_key_value_heads=HEADS, max_position_embeddings=131072, initializer_range=0.3, rope_parameters=scaling,
)
model = LlamaForCausalLM(config).eval()

folder = Path(sys.argv[1])
writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
writer.add_vocab_size(VOCAB)
writer.add_context_length(131072)
writer.add_embedding_length(WIDTH)
writer.add_feed_forward_length(WIDTH)
writer.add_block_count(LAYERS)
writer.add_head_count(HEADS)
writer.add_head_count_kv(HEADS)
writer.add_layer_norm_rms_eps(config.rms_norm_eps)
writer.add_rope_freq_base(THETA)
writer.add_rope_dimension_count(WIDTH // HEADS)
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
for name, tensor in model.state_dict().items():
    array = tensor.numpy()
    if name.endswith(("q_proj.weight", "k_proj.weight")):  # the order of llama.cpp's rotary dimensions
        array = array.reshape(HEADS, 2, -1, WIDTH).swapaxes(1, 2).reshape(array.shape)
    writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(array))
plain = 1 / THETA ** (np.arange(0, WIDTH // HEADS, 2) / (WIDTH // HEADS))
factors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
writer.add_tensor("rope_freqs.weight", factors)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32).eval()
print("rope factors in the file:", [round(float(factor), 2) for factor in factors])
print("loaded:", loaded.config.rope_parameters)
ids = torch.randint(0, VOCAB, (1, 32))
moved = {}
with torch.no_grad():
    for step in (1, 1000):
        positions = torch.arange(0, 32 * step, step)[None]
        logits = [each(ids, position_ids=positions).logits for each in (model, loaded)]
        moved[step] = (logits[0] - logits[1]).abs().max().item()
        print(f"{32 * step} positions: logits differ by up to {moved[step]:.3f}")
    loaded.model.rotary_emb.inv_freq.copy_(model.model.rotary_emb.inv_freq)
    same = (loaded(ids, position_ids=positions).logits - logits[0]).abs().max().item()
print(f"with the file's factors put back: {same:.1e}")
assert loaded.config.rope_parameters["rope_type"] == "default"
assert moved[1000] > 10 * moved[1] and same < 1e-3
PY
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/show.py" "$folder" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
