#!/usr/bin/env bash
# torch: on a CPU, attention of one new token takes many times as long in bfloat16 as in float32, and the layout of the heads decides it.
#
# A good guess: half the bytes of keys and values to read, so bfloat16 decodes at least as fast as float32, as its matrix products do.
# What happens: `scaled_dot_product_attention` with a single query takes the slow way in bfloat16, with `enable_gqa` and with repeated keys
# alike. With grouped keys, the heads of a group can be passed as queries of their key head: the same numbers in a tenth of the time.
# What follows: transformers decodes grouped-query models (Llama 3, Qwen 2.5) in bfloat16 on a CPU with attention that outweighs its layers.
#
# Exits 1 when the behaviour is no longer the one described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > "$folder/show.py" <<'PY'
import time

import torch
from torch.nn.functional import scaled_dot_product_attention as attend

print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())
torch.set_num_threads(1)
ROWS, HEADS, KEY_HEADS, TOKENS, SIZE = 16, 12, 2, 512, 128


def milliseconds(call):
    call()
    times = []
    for _ in range(9):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return 1000 * min(times)


found = {}
for dtype in (torch.float32, torch.bfloat16):
    torch.manual_seed(0)
    query = torch.randn(ROWS, HEADS, 1, SIZE, dtype=dtype)
    key, value = torch.randn(2, ROWS, KEY_HEADS, TOKENS, SIZE, dtype=dtype)
    grouped = query.view(ROWS, KEY_HEADS, HEADS // KEY_HEADS, SIZE)
    usual = lambda: attend(query, key, value, enable_gqa=True)
    heads_as_queries = lambda: attend(grouped, key, value).view_as(query)
    torch.testing.assert_close(usual(), heads_as_queries(), atol=0.01, rtol=0.05)
    found[dtype] = milliseconds(usual), milliseconds(heads_as_queries)
    print(f"{dtype}: {found[dtype][0]:.2f} ms with enable_gqa, {found[dtype][1]:.2f} ms with heads as queries")
assert found[torch.bfloat16][0] > 2 * found[torch.float32][0]
assert found[torch.bfloat16][0] > 4 * found[torch.bfloat16][1]
PY
"$folder/venv/bin/python" -W ignore "$folder/show.py"
