#!/usr/bin/env bash
# transformers and torch: `logits_to_keep=1` takes seconds on a CPU in bfloat16 once the model is frozen.
#
# A good guess: the head for the last position costs next to nothing, frozen or not; `generate` asks for it so for every prompt.
# What happens: the kept slice is not contiguous. A weight that requires a gradient, even under `no_grad`, makes `linear` copy the slice;
# a frozen one makes it a batched matmul, which transposes and copies the whole head for each row.
# What follows: freezing a base model, as PEFT does, makes batched generation and training loops wait at each prompt, longer than all logits
# would take. `logits_to_keep=torch.tensor([-1])` gives the same logits at once. Float32 is not affected.
#
# Exits 1 when the behaviour is no longer the one described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.19.0
cat > "$folder/show.py" <<'PY'
import time

import torch
import transformers
from transformers import Qwen2Config, Qwen2ForCausalLM

print("torch", torch.__version__, "transformers", transformers.__version__, torch.backends.cpu.get_cpu_capability())
torch.manual_seed(0)
config = Qwen2Config(
    vocab_size=151936, hidden_size=896, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=14,
    num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
)
model = Qwen2ForCausalLM(config).eval()


def milliseconds(call):
    call()
    times = []
    for _ in range(2):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return 1000 * min(times)


def forward(rows, **keep):
    ids = torch.arange(rows * 16).view(rows, 16)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **keep).logits


last = torch.tensor([-1])
for dtype, trained in ((torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, False)):
    model.to(dtype).requires_grad_(trained)
    for rows in (1, 4):
        number, tensor, everything = (
            milliseconds(lambda: forward(rows, **keep))
            for keep in ({"logits_to_keep": 1}, {"logits_to_keep": last}, {})
        )
        print(f"{dtype}, {'trained' if trained else 'frozen'}, {rows} rows: {number:.0f} ms with 1, {tensor:.0f} ms with tensor([-1]), "
              f"{everything:.0f} ms for all")
assert torch.allclose(forward(4, logits_to_keep=1), forward(4, logits_to_keep=last), atol=0.1)
assert number > 5 * tensor and number > everything
PY
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/show.py"
