"""CPU decoding with grouped SDPA and a preallocated KV cache against transformers' `sdpa` and growing cache.

    .venv/bin/python benchmarks/generation.py        # about 7 minutes; writes benchmarks/generation.json

All variants decode the same prompts with the same `generate` call, interleaved in one process. `A/A` is the reference
against itself: its distance from 1 is noise.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import StaticCache

from mote.core.machine import environment
from mote.models.attention import GROUPED_SDPA
from mote.models.embedded import EMBEDDED
from mote.models.load import load_base

ROWS = 16
PROMPT = 300
NEW = 24
ROUNDS = 7
VARIANTS = {"reference": ("sdpa", False), "again": ("sdpa", False), "grouped": (GROUPED_SDPA, False),
            "preallocated": ("sdpa", True), "both": (GROUPED_SDPA, True)}  # fmt: skip


def decode(model: Any, ids: torch.Tensor, attention: str, preallocated: bool) -> tuple[float, torch.Tensor]:
    """Seconds of decoding, without the prefill, and the tokens."""
    model.set_attn_implementation(attention)
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + NEW) if preallocated else None
    mask = torch.ones_like(ids)
    mask[0, 5] = 0  # as left padding does, so that there is a mask
    with torch.inference_mode():
        cache = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache, use_cache=True,
                      logits_to_keep=1).past_key_values  # fmt: skip
        began = time.perf_counter()
        out = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW,
                             min_new_tokens=NEW, do_sample=False)  # fmt: skip
    return time.perf_counter() - began, out[:, PROMPT:]


def main() -> None:
    """Measure all variants in turn and write the ratios."""
    base = load_base(EMBEDDED, device="cpu")
    ids = torch.randint(100, 4000, (ROWS, PROMPT), generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    tokens: dict[str, torch.Tensor] = {}
    for turn in range(ROUNDS + 1):
        for name, (attention, preallocated) in VARIANTS.items():
            taken, tokens[name] = decode(base.model, ids, attention, preallocated)
            if turn:  # the first turn warms up
                seconds[name].append(taken)
    ratios = {
        name: [mine / reference for mine, reference in zip(seconds[name], seconds["reference"], strict=True)]
        for name in VARIANTS
    }
    result = {
        "what": "decoding time over transformers' sdpa with a growing cache, medians of paired rounds",
        "shape": {"rows": ROWS, "prompt_tokens": PROMPT, "new_tokens": NEW, "rounds": ROUNDS, "model": EMBEDDED},
        "reference_seconds_a_token": round(statistics.median(seconds["reference"]) / NEW, 4),
        "ratio": {
            {"again": "A/A"}.get(name, name): {
                "median": round(statistics.median(values), 3),
                "min": round(min(values), 3),
                "max": round(max(values), 3),
            }
            for name, values in ratios.items()
            if name != "reference"
        },
        "same_tokens": {name: bool(torch.equal(out, tokens["reference"])) for name, out in tokens.items()},
        **environment(),
    }  # fmt: skip
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
