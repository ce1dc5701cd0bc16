"""What is measured of one variant: a training step, decoding token by token, saved activations, peak memory.

Shapes: B row, T token.
"""

import gc
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from mote.experiments.bench.variants import Variant
from mote.tokens.routing import QUESTION

SHARES = (0.40, 0.20, 0.15, 0.25)  # of a row: question, analysis, guidance, response
PREFILL, TOKENS = 64, 32


@dataclass(frozen=True)
class Batch:
    """Rows to train on (B, T): random ids in segments of unequal lengths, other ones in each row."""

    ids: Tensor
    steps: Tensor
    labels: Tensor

    def inputs(self, variant: Variant) -> dict[str, Any]:
        """What a variant is called with; one with trained markers reads the steps from the markers themselves."""
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
    """A fixed batch; the lengths of the segments differ from `SHARES` by up to a fifth."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (rows, length), generator=generator)
    shares = torch.tensor(SHARES) * (0.8 + 0.4 * torch.rand(rows, len(SHARES), generator=generator))
    ends = (shares.cumsum(1) / shares.sum(1, keepdim=True) * length).round().long()
    steps = (torch.arange(length)[None, :, None] >= ends[:, None, :-1]).sum(-1)
    labels = torch.where(steps == QUESTION, -100, ids)
    return Batch(ids.to(device), steps.to(device), labels.to(device))


class TrainingStep:
    """TrainingStep steps of one variant on one batch: forward, backward, AdamW."""

    def __init__(self, variant: Variant, batch: Batch) -> None:
        self.variant = variant
        self.inputs = batch.inputs(variant)
        trained = variant.trained()
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None  # Trainer's own

    def loss(self) -> Tensor:
        """The forward pass."""
        loss: Tensor = self.variant.model(**self.inputs).loss
        return loss if self.variant.extra_loss is None else loss + self.variant.extra_loss()

    def __call__(self) -> float:
        """Seconds of one step."""
        self.variant.model.train()
        synchronize()
        began = time.perf_counter()
        self.loss().backward()  # type: ignore[no-untyped-call]
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        synchronize()
        return time.perf_counter() - began


class DecodingStep:
    """One token at a time behind a short prompt in a static cache; the variants take turns token by token.

    Args:
        variant: What to decode with.
        steps: The step each row is in.
        vocab: Ids are drawn below it.
    """

    def __init__(self, variant: Variant, steps: Tensor, vocab: int) -> None:
        self.variant = variant
        self.cache = StaticCache(config=variant.causal.config, max_cache_len=PREFILL + TOKENS)
        shape = len(steps), PREFILL + TOKENS
        self.ids = torch.randint(vocab, shape, generator=torch.Generator().manual_seed(0)).to(steps.device)
        self.steps = torch.full(shape, QUESTION, device=steps.device)
        self.steps[:, PREFILL:] = steps[:, None]
        self.place = 0

    @torch.inference_mode()
    def prefill(self) -> None:
        """Read the prompt into an empty cache; only the tokens after it are measured, so it is not compiled."""
        self.variant.model.eval()
        self.cache.reset()
        self.place = 0
        with torch.compiler.set_stance("force_eager"):
            self._forward(PREFILL)

    @torch.inference_mode()
    def __call__(self) -> float:
        """Seconds of the next token."""
        synchronize()
        began = time.perf_counter()
        self._forward(1)
        synchronize()
        return time.perf_counter() - began

    def _forward(self, tokens: int) -> None:
        part = slice(self.place, self.place + tokens)
        steps = {"step_ids": self.steps[:, part]} if self.variant.takes_steps else {}
        self.variant.model(
            input_ids=self.ids[:, part], past_key_values=self.cache, use_cache=True, logits_to_keep=1, **steps
        )
        self.place += tokens


def saved_mb(training: TrainingStep) -> float:
    """MB that a forward pass keeps for the backward pass, parameters and buffers left out."""
    training.variant.model.train()
    model = training.variant.model
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself may own the graph that holds it, which then is never freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        training.loss()
    return round(sum(sizes.values()) / 2**20, 2)


def peak_mb_on_gpu(variant: Variant, batch: Batch) -> float:
    """Peak MB of two training steps: base weights, what the variant adds, optimiser and activations."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    training = TrainingStep(variant, batch)
    training()
    training()
    return round(torch.cuda.max_memory_allocated() / 2**20, 1)


def synchronize() -> None:
    """Wait for the GPU, where one is used."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
