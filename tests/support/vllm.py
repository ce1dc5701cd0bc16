"""For tests of the vLLM plugin: served folders of tiny random models, and the uncached reference."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig

import mote
from mote.core.scheme import BASE
from mote.inference.grammar import FreeText, StepGrammar
from mote.inference.model import Model
from mote.serve.vllm.export_folder import export_vllm
from mote.tokens.encode import special_ids
from support.exports import make_adapter
from support.tiny import make_tiny_model

# vLLM's CPU attention needs heads of 32 or more.
SMALL = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32}


def make_base(folder: Path, kind: str = "Llama", **changes: Any) -> Path:
    """A random model of an architecture, with the tests' tokenizer."""
    import transformers

    make_tiny_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    name = f"{kind}Text" if kind == "Gemma3" else kind
    settings = {"num_key_value_heads": 2, "max_position_embeddings": 2048, "tie_word_embeddings": True, **SMALL}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,
        **{**settings, **changes},
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 0.0 if "Gemma" in kind else 1.0, 0.1)
    model.generation_config = GenerationConfig.from_model_config(config)
    model.save_pretrained(folder)
    return folder


def make_served(folder: Path, kind: str = "Llama", adapter: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A folder with `base`, `adapter` and `out`, which vLLM serves."""
    base = make_base(folder / "base", kind, **changes)
    make_adapter(base, folder / "adapter", **(adapter or {}))
    export_vllm(str(folder / "adapter"), folder / "out")
    return folder


@torch.no_grad()
def reference(model: Model, prompt: Sequence[int], mode: str, budget: int, most: int | None = None) -> list[int]:
    """Greedy ids of an answer from uncached forward passes of the PEFT model over the whole text."""
    written: list[int] = []
    markers = model.markers
    eos = model.tokenizer.eos_token_id
    if mode == BASE:
        grammar: Any = FreeText([eos], [*markers.starts, *markers.ends])
    else:
        chains = [tuple(model.experts.index(step) for step in chain) for chain in model.scheme.chains_of(mode)]
        grammar = StepGrammar(chains, markers, special_ids(model.tokenizer), eos, budget, most)
    with model.model.disable_adapter() if mode == BASE else nullcontext():
        while not written or not (grammar.ended(written) or (mode == BASE and len(written) == budget)):
            scores = model.model(input_ids=torch.tensor([[*prompt, *written]])).logits[0, -1]
            written.append(int(grammar.mask(scores, written).argmax()))
    return written


def load_served(folder: Path) -> Model:
    """The adapter in this process, as `mote` loads it."""
    return mote.load(str(folder / "base"), folder / "adapter", device="cpu", dtype="float32")


@contextmanager
def vllm_server(model: Path, log: Path, *arguments: str) -> Iterator[str]:
    """Address of a stock vLLM server that runs in another process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1",
               "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "512",
               "--block-size", "32", *arguments]  # fmt: skip
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
        )
    url = f"http://127.0.0.1:{port}"
    until = time.monotonic() + 600
    try:
        while True:
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-2000:]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(120)
