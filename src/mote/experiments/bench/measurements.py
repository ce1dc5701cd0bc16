"""Measurements of one variant: training step, token-by-token decoding, saved activations, peak memory.

Shapes: B row, T token.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from mote.experiments.bench.variants import Variant
from mote.models.kv_cache import cache_argument
from mote.tokens.routing import QUESTION

SHARES = (0.40, 0.20, 0.15, 0.25)  # of a row's tokens: question, analysis, guidance, response
PREFILL = 64  # prompt tokens
TOKENS = 32  # decoded tokens


@dataclass(frozen=True)
class Batch:
    """Training rows (B, T): random ids in segments whose lengths differ between rows."""

    ids: Tensor
    steps: Tensor
    labels: Tensor

    def inputs(self, variant: Variant) -> dict[str, Any]:
        """Forward arguments of a variant; one with trained markers gets markers instead of step ids."""
        given: dict[str, Any] = {"input_ids": self.ids, "labels": self.labels, "use_cache": False}
        if variant.starts:
            begins = torch.zeros_like(self.steps, dtype=torch.bool)
            begins[:, 1:] = self.steps[:, 1:] != self.steps[:, :-1]
            starts = torch.tensor((0, *variant.starts), device=self.ids.device)
            given["input_ids"] = torch.where(begins, starts[self.steps], self.ids)
        elif variant.takes_steps:
            given["step_ids"] = self.steps
        return given


def make_batch(rows: int, length: int, vocab: int, device: str) -> Batch:
    """A fixed batch; segment lengths vary by up to a fifth around `SHARES`."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (rows, length), generator=generator)
    shares = torch.tensor(SHARES) * (0.8 + 0.4 * torch.rand(rows, len(SHARES), generator=generator))
    ends = (shares.cumsum(1) / shares.sum(1, keepdim=True) * length).round().long()
    steps = (torch.arange(length)[None, :, None] >= ends[:, None, :-1]).sum(-1)
    labels = torch.where(steps == QUESTION, -100, ids)
    return Batch(ids.to(device), steps.to(device), labels.to(device))


class TrainingStep:
    """One training step of a variant on a fixed batch: forward, backward, AdamW; `clock` times it."""

    def __init__(self, variant: Variant, batch: Batch, clock: Callable[[], float] = time.perf_counter) -> None:
        self.variant = variant
        self.clock = clock
        self.inputs = batch.inputs(variant)
        trained = variant.trained()
        self.optimizer = (
            torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None
        )  # as in transformers' Trainer

    def loss(self) -> Tensor:
        """Loss of one forward pass."""
        loss: Tensor = self.variant.model(**self.inputs).loss
        return loss if self.variant.extra_loss is None else loss + self.variant.extra_loss()

    def __call__(self) -> float:
        """Run one step; returns its seconds."""
        self.variant.model.train()
        synchronize()
        began = self.clock()
        self.loss().backward()  # type: ignore[no-untyped-call]
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        synchronize()
        return self.clock() - began


class DecodingStep:
    """Decodes one token per call after a short prompt in a static cache, so that variants can alternate per token.

    Args:
        variant: The variant.
        steps: Step of each row (B).
        vocab: Vocabulary size of the random ids.
    """

    def __init__(self, variant: Variant, steps: Tensor, vocab: int) -> None:
        self.variant = variant
        self.cache_argument = cache_argument(variant.causal)
        self.cache = StaticCache(config=variant.causal.config, max_cache_len=PREFILL + TOKENS)
        shape = (len(steps), PREFILL + TOKENS)
        self.ids = torch.randint(vocab, shape, generator=torch.Generator().manual_seed(0)).to(steps.device)
        self.steps = torch.full(shape, QUESTION, device=steps.device)
        self.steps[:, PREFILL:] = steps[:, None]
        self.offset = 0

    @torch.inference_mode()
    def prefill(self) -> None:
        """Prefill the prompt into an empty cache; not measured, so not compiled."""
        self.variant.model.eval()
        self.cache.reset()
        self.offset = 0
        with torch.compiler.set_stance("force_eager"):
            self._forward(PREFILL)

    @torch.inference_mode()
    def __call__(self) -> float:
        """Decode the next token; returns its seconds."""
        synchronize()
        began = time.perf_counter()
        self._forward(1)
        synchronize()
        return time.perf_counter() - began

    def _forward(self, tokens: int) -> None:
        part = slice(self.offset, self.offset + tokens)
        steps = {"step_ids": self.steps[:, part]} if self.variant.takes_steps else {}
        cache = {self.cache_argument: self.cache}
        self.variant.model(input_ids=self.ids[:, part], use_cache=True, logits_to_keep=1, **cache, **steps)
        self.offset += tokens


def saved_mb(training: TrainingStep) -> float:
    """MB that a forward pass saves for the backward pass, without parameters and buffers."""
    training.variant.model.train()
    model = training.variant.model
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself may own the graph that saves it, a cycle that is never freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        training.loss()
    return round(sum(sizes.values()) / 2**20, 2)


def peak_mb_on_gpu(variant: Variant, batch: Batch) -> float:
    """Peak MB of two training steps: base weights, the variant's parameters, optimiser and activations."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    training = TrainingStep(variant, batch)
    training()
    training()
    return round(torch.cuda.max_memory_allocated() / 2**20, 1)


def synchronize() -> None:
    """Wait for the current GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make_current(device: str) -> None:
    """Make a GPU the current one: waiting and memory counters refer to that, not to where tensors are."""
    index = torch.device(device).index
    if device.startswith("cuda") and index is not None:
        torch.cuda.set_device(index)
