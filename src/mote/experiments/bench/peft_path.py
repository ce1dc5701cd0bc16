"""The path of a PEFT user: `get_peft_model` on a base as transformers loads it, and loops of one's own.

Nothing is sped up: no `mote.load`, no `mote.speed_up`, transformers' own attention and `DynamicCache`, steps read from
the markers among the ids. LoRA of the same active rank runs in the same process and takes turns token by token.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mote.experiments.bench.measurements import TOKENS, Batch, TrainingStep
from mote.experiments.bench.timing import interleave, say
from mote.experiments.bench.variants import BASE, CONTROL, PLAIN, REFERENCE, Variant, build, share

VARIANTS = (BASE, REFERENCE, CONTROL, PLAIN)
PROMPT = 64  # tokens


def peft_measures(base: Any, batch: Batch, rounds: int) -> Iterator[tuple[str, str, dict[str, list[float]]]]:
    """Measure a training step, a token of a decoding loop and a call of `generate`, in seconds of CPU time.

    Yields:
        Name, unit and variant -> rounds.
    """
    variants = {}
    for name in VARIANTS:
        copied = share(base, name)
        copied.set_attn_implementation("sdpa")
        variants[name] = build(name, copied)
    steps = {name: TrainingStep(variant, batch, time.process_time) for name, variant in variants.items()}
    yield _measured("PEFT training step", steps, rounds)
    for variant in variants.values():
        variant.model.eval()
    for case, marked in (("in a step", True), ("without a step", False)):
        name = f"PEFT decoding {case}"
        say(f"{name}: {rounds} rounds")
        medians: dict[str, list[float]] = {one: [] for one in variants}
        means: dict[str, list[float]] = {one: [] for one in variants}
        for round_ in range(rounds + 1):
            loops = {one: Loop(variant, marked) for one, variant in variants.items()}
            for one, seconds in interleave(loops, TOKENS).items():
                if round_:  # the first round warms up
                    medians[one].append(statistics.median(seconds))
                    means[one].append(statistics.mean(seconds))
        yield name, "s", medians
        yield f"{name}, mean with first token", "s", means
    calls = {name: Generate(variant) for name, variant in variants.items()}
    yield _measured("PEFT generate", calls, rounds)


def _measured(
    name: str, actions: Mapping[str, Callable[[], float]], rounds: int
) -> tuple[str, str, dict[str, list[float]]]:
    say(f"{name}: {rounds} rounds")
    for action in actions.values():  # warms up
        action()
    return name, "s", interleave(actions, rounds)


def text_of(variant: Variant, marked: bool) -> Tensor:
    """Random ids (1, PROMPT + TOKENS); if `marked`, the prompt's last is a step's start marker where there are any."""
    shape = (1, PROMPT + TOKENS)
    ids = torch.randint(1, variant.vocab, shape, generator=torch.Generator().manual_seed(0))
    if marked and variant.starts:
        ids[0, PROMPT - 1] = variant.starts[-1]
    return ids


class Loop:
    """A user's decoding loop: the prompt is prefilled, then each call decodes one token over `past_key_values`."""

    @torch.inference_mode()
    def __init__(self, variant: Variant, marked: bool) -> None:
        self.model = variant.model
        self.ids = text_of(variant, marked)
        self.offset = PROMPT
        self.cache = self.model(input_ids=self.ids[:, :PROMPT], use_cache=True).past_key_values

    @torch.inference_mode()
    def __call__(self) -> float:
        """Decode the next token; returns its seconds of CPU time."""
        ids = self.ids[:, self.offset : self.offset + 1]
        self.offset += 1
        began = time.process_time()
        self.model(input_ids=ids, past_key_values=self.cache)
        return time.process_time() - began


class Generate:
    """A call of `generate` for a greedy continuation of `TOKENS` tokens."""

    def __init__(self, variant: Variant) -> None:
        self.model = variant.model
        ids = text_of(variant, marked=True)[:, :PROMPT]
        length = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
        self.call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, **length}

    def __call__(self) -> float:
        """Generate; returns the seconds of CPU time."""
        began = time.process_time()
        self.model.generate(**self.call)
        return time.process_time() - began
