#!/usr/bin/env bash
# llama.cpp: an activated LoRA (aLoRA) reads the token before its invocation token too.
#
# A good guess: with `adapter.alora.invocation_tokens` the server applies the LoRA from the invocation tokens on, as PEFT does, so that a
#   prompt's cache can be shared by many adapters.
# What happens: it splits the prompt one token earlier: the last token that the base model should have read is read by the LoRA.
# What follows: log-probabilities differ from those that the adapter was trained with, in the prompt and in all that is generated.
#
# Exits 1 when the behaviour is no longer the one described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check xllamacpp==2026.10.11549 gguf==0.19.0
cat > "$folder/show.py" <<'PY'
import json
import urllib.request
from pathlib import Path

import gguf
import numpy as np
import xllamacpp

D, V, INVOKE = 32, 48, 40
draw = np.random.default_rng(0)
part = {name: draw.normal(size=size).astype(np.float32) for name, size in
        {"embed": (V, D), "value": (D, D), "a": (4, D), "b": (D, 4)}.items()}
folder = Path(__file__).parent


def write(path, architecture, fields, tensors):
    writer = gguf.GGUFWriter(path, architecture)
    fields(writer)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def model_fields(writer):
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([chr(65 + i) for i in range(V)])
    writer.add_token_types([1] * V)
    writer.add_token_merges(["A B"])
    writer.add_eos_token_id(0)


def lora_fields(writer):
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)  # the rank: scale 1
    writer.add_key_value("adapter.alora.invocation_tokens", [INVOKE], gguf.GGUFValueType.ARRAY,
                         sub_type=gguf.GGUFValueType.UINT32)


# One block of uniform attention (queries and keys are zero) and no MLP: logits = embed norm(x + mean over tokens of v).
zero, one, eye = np.zeros((D, D)), np.ones(D), np.eye(D)
write(folder / "base.gguf", "llama", model_fields, {
    "token_embd.weight": part["embed"], "output_norm.weight": one, "blk.0.attn_norm.weight": one,
    "blk.0.ffn_norm.weight": one, "blk.0.attn_q.weight": zero, "blk.0.attn_k.weight": zero,
    "blk.0.attn_v.weight": part["value"], "blk.0.attn_output.weight": eye, "blk.0.ffn_gate.weight": zero,
    "blk.0.ffn_up.weight": zero, "blk.0.ffn_down.weight": zero,
})
write(folder / "alora.gguf", "llama", lora_fields,
      {"blk.0.attn_v.weight.lora_a": part["a"], "blk.0.attn_v.weight.lora_b": part["b"]})


def norm(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def expected(ids, first):
    """Log-probabilities of the next token with the LoRA on the tokens from index `first` on."""
    x = part["embed"][ids]
    value = norm(x) @ part["value"].T
    value[first:] += norm(x[first:]) @ part["a"].T @ part["b"].T
    logits = part["embed"] @ norm(x[-1] + value.mean(0))
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


params = xllamacpp.CommonParams()
params.model.path = str(folder / "base.gguf")
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(folder / "alora.gguf"), 1.0)]
params.n_ctx, params.n_parallel, params.port, params.verbosity = 64, 1, 0, -1
params.hostnames = ["127.0.0.1"]
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)


def served(ids):
    body = {"prompt": ids, "n_predict": 1, "n_probs": V, "temperature": 0, "lora": [{"id": 0, "scale": 1.0}],
            "logit_bias": [[7, 1000.0]]}
    call = urllib.request.Request(server.listening_address + "/completion", json.dumps(body).encode())
    top = json.load(urllib.request.urlopen(call))["completion_probabilities"][0]["top_logprobs"]
    found = np.full(V, -np.inf)
    for token in top:
        found[token["id"]] = token["logprob"]
    return found


print("llama.cpp", xllamacpp.__version__)
ids = [5, 9, 12, 17, INVOKE, 21, 22]
start = ids.index(INVOKE)
right = np.abs(served(ids) - expected(ids, start)).max()
early = np.abs(served(ids) - expected(ids, start - 1)).max()
print(f"difference to the LoRA from the invocation token on:   {right:.5f}")
print(f"difference to the LoRA from the token before it on:    {early:.5f}")
assert early < 0.05 < 1 < right
PY
"$folder/venv/bin/python" "$folder/show.py" 2>/dev/null
