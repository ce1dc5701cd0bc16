"""CPU time of a decoded token where next to nothing is computed: what a GPU waits for between its kernels.

    .venv/bin/python benchmarks/dispatch.py        # about a minute; writes benchmarks/dispatch.json

A tiny Llama of as many blocks as a small model, one row, a growing cache, on the path that a GPU takes: without the
CPU's decoder and its matmuls. Time is that of the process, so that other programs count little; rounds are interleaved.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from mote.core.files import write_json
from mote.core.machine import environment
from mote.experiments.bench import variants
from mote.experiments.bench.expert_settings import SHAPES
from mote.experiments.bench.timing import compare, interleave
from mote.experiments.bench.variants import CONTROL, REFERENCE, Variant, build, share
from mote.tuner import experts
from mote.tuner.cpu_decode import CpuDecoder

LAYERS = 24
TOKENS = 25
ROUNDS = 9
NAMES = ("base", REFERENCE, CONTROL, "lora-64", "mote-4x16")
AS_FUNCTION = "mote-4x16, through the autograd function"


def token(variant: Variant, cache: Any, tokens: int) -> None:
    ids = torch.zeros(1, tokens, dtype=torch.long)
    steps = {"step_ids": ids + 3} if variant.takes_steps else {}
    variant.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **steps)


def seconds(variant: Variant) -> float:
    """Seconds of a decoded token behind a prompt of eight."""
    variant.model.eval()
    with torch.inference_mode():
        cache = DynamicCache(config=variant.causal.config)
        token(variant, cache, 8)
        token(variant, cache, 1)
        began = time.process_time()
        for _ in range(TOKENS):
            token(variant, cache, 1)
        return (time.process_time() - began) / TOKENS


def as_function(variant: Variant) -> float:
    """The same, with the experts added by the function that training uses."""
    before = experts._without_gradients
    experts._without_gradients = lambda *arguments: experts.Fused.apply(*arguments)
    try:
        return seconds(variant)
    finally:
        experts._without_gradients = before


def main() -> None:
    """Measure, print the ratios and write the JSON."""
    torch.set_num_threads(1)
    CpuDecoder.decode_step = lambda *_, **__: None  # type: ignore[method-assign]
    variants.speed_up = lambda model: None  # as for layers on a GPU
    config = LlamaConfig(**{**SHAPES["tiny"], "num_hidden_layers": LAYERS}, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    built = {name: build(name, share(base, name)) for name in NAMES}
    actions: dict[str, Callable[[], float]] = {
        name: lambda variant=variant: seconds(variant) for name, variant in built.items()
    }
    actions[AS_FUNCTION] = lambda: as_function(built["mote-4x16"])
    for action in actions.values():
        action()
    found = compare(interleave(actions, ROUNDS), {"ratio": REFERENCE})
    result = {
        "what": f"CPU seconds of a decoded token over {REFERENCE}, one row, where dispatch is all there is",
        "shape": {"layers": LAYERS, "tokens": TOKENS, "rounds": ROUNDS, **SHAPES["tiny"], "num_hidden_layers": LAYERS},
        "variants": found,
        **environment(),
    }
    write_json(Path(__file__).with_suffix(".json"), result)
    print(json.dumps({name: [row["median"], row["ratio"]] for name, row in found.items()}, indent=2))


if __name__ == "__main__":
    main()
