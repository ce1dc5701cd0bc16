"""For tests of GGUF files: llama.cpp's own server in this process, asked for the logits of chosen tokens."""

import json
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

PLAIN_ID = 70  # a letter in the tests' tokenizer


class LlamaServer:
    """llama-server on a GGUF file, on a free port of loopback."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self.address: str = server.listening_address

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self.address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)

    def complete(self, ids: Sequence[int], tokens: int = 1, **more: Any) -> Any:
        body = {"prompt": list(ids), "n_predict": tokens, "temperature": 0, "return_tokens": True, "cache_prompt": True}
        return self.post("/completion", {**body, **more})

    def log_probs(self, ids: Sequence[int], rows: int, **more: Any) -> Tensor:
        """Log-probabilities (V) of the token after these ids."""
        # Nothing is reported of the end of a turn or of half a character, so another token is sampled.
        reply = self.complete(ids, n_probs=rows, logit_bias=[[PLAIN_ID, 1000.0]], **more)
        found = reply["completion_probabilities"][0]["top_logprobs"]
        out = torch.full((rows,), float("-inf"))
        for token in found:
            out[token["id"]] = token["logprob"]
        return out

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = self.post("/tokenize", {"content": text, "parse_special": True})["tokens"]
        return ids


@contextmanager
def llama_server(path: Path, loras: Sequence[Path] = (), slots: int = 1, context: int = 512) -> Iterator[LlamaServer]:
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp (pip install xllamacpp) is not installed")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = context * slots
    params.n_parallel = slots
    params.warmup = False
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.verbosity = -1
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0) for lora in loras]
    yield LlamaServer(xllamacpp.Server(params))
