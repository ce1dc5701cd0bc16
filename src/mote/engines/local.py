"""In-process transformers: left-padded batches that compute a shared beginning (system prompt, examples) once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, StaticCache

from mote.engines.protocol import Completion, Prompt
from mote.errors import UserError
from mote.models import Base
from mote.sampling import SeededSampler
from mote.tokens import encode_prompt


@dataclass(frozen=True)
class _Batch:
    """Rows that share their first `shared` tokens; the padding stands behind those."""

    ids: Tensor  # (B, T)
    mask: Tensor  # (B, T)
    shared: int


class LocalEngine:
    """A base model in this process."""

    def __init__(self, base: Base, batch_size: int) -> None:
        self.name = base.name
        self.base = base
        self.batch_size = batch_size

    def write(self, prompts: Sequence[Prompt]) -> list[Completion]:
        """See `Engine.write`; rows of like length are batched together."""
        encoded = [encode_prompt(self.base.tokenizer, prompt.messages) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda i: (prompts[i].temperature, prompts[i].top_p, len(encoded[i])))
        done: dict[int, Completion] = {}
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            completions = self._write([prompts[i] for i in chosen], [encoded[i] for i in chosen])
            done |= dict(zip(chosen, completions, strict=True))
        return [done[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def choose(self, prompts: Sequence[Prompt], choices: tuple[str, str]) -> list[float]:
        """See `Engine.choose`; compares the first tokens of the two words.

        Raises:
            UserError: The words begin with the same token.
        """
        first, second = (self.base.tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in choices)
        if first == second:
            raise UserError(f"check: {choices} begin with the same token of {self.name}; use chains.check=rule")
        encoded = [encode_prompt(self.base.tokenizer, prompt.messages) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
        scores: dict[int, float] = {}
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = self._batch([encoded[i] for i in chosen])
            positions = (batch.mask.cumsum(1) - 1).clamp_min(0)
            logits = self.base.model(
                input_ids=batch.ids[:, batch.shared :],
                attention_mask=batch.mask,
                position_ids=positions[:, batch.shared :],
                past_key_values=self._prefill(batch, 0),
                logits_to_keep=1,
            ).logits[:, -1]
            pair = logits[:, [first, second]].float().softmax(-1)[:, 0].tolist()
            scores |= dict(zip(chosen, pair, strict=True))
        return [scores[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def _write(self, prompts: list[Prompt], encoded: list[list[int]]) -> list[Completion]:
        tokenizer, batch = self.base.tokenizer, self._batch(encoded)
        length = batch.ids.shape[1]
        limit = max(prompt.max_tokens for prompt in prompts)
        sampler = LogitsProcessorList()
        if prompts[0].temperature > 0:
            sampler.append(SeededSampler([p.seed for p in prompts], length, prompts[0].temperature, prompts[0].top_p))
        out = self.base.model.generate(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            past_key_values=self._prefill(batch, limit),
            max_new_tokens=limit,
            do_sample=False,
            logits_processor=sampler,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )[:, length:].tolist()
        completions = []
        for prompt, ids in zip(prompts, out, strict=True):
            ended = tokenizer.eos_token_id in ids[: prompt.max_tokens]
            kept = ids[: ids.index(tokenizer.eos_token_id)] if ended else ids[: prompt.max_tokens]
            text = tokenizer.decode(kept, skip_special_tokens=True).strip()
            completions.append(Completion(text=text, tokens=len(kept) + ended, finish="stop" if ended else "length"))
        return completions

    def _batch(self, encoded: list[list[int]]) -> _Batch:
        longest = max(len(ids) for ids in encoded)
        alike = [len(set(column)) == 1 for column in zip(*encoded, strict=False)]
        shared = min((alike + [False]).index(False), min(len(ids) for ids in encoded) - 1)
        pad = self.base.tokenizer.pad_token_id
        rows, mask = [], []
        for ids in encoded:
            gap = longest - len(ids)
            rows.append(ids[:shared] + [pad] * gap + ids[shared:])
            mask.append([1] * shared + [0] * gap + [1] * (len(ids) - shared))
        device = self.base.model.device
        return _Batch(torch.tensor(rows, device=device), torch.tensor(mask, device=device), shared)

    def _prefill(self, batch: _Batch, new_tokens: int) -> StaticCache:
        """A cache with room for all tokens; the shared beginning is computed for one row and copied to all.

        A growing cache would be copied whole for every token.
        """
        rows, length = batch.ids.shape
        cache = StaticCache(config=self.base.model.config, max_cache_len=length + new_tokens)
        if batch.shared:
            one = DynamicCache(config=self.base.model.config)
            self.base.model(
                input_ids=batch.ids[:1, : batch.shared], past_key_values=one, use_cache=True, logits_to_keep=1
            )
            for index, layer in enumerate(one.layers):
                cache.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), index)
        return cache
