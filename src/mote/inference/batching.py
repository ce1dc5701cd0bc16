"""Continuous batching in this process: a sequence joins the running batch as soon as another one has ended.

Each forward pass decodes one token per running sequence and prefills a chunk of the waiting prompts, so neither blocks
the other. This module knows nothing of chains or chats: token ids in, token ids out.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mote.inference.batch_loop import BatchLoop
from mote.inference.kv_slots import EMPTY, SLOTS, BatchPlan, PrefillChunk, Prefix, SlotCache, executing
from mote.inference.sequence import RunningSequence, by_prefix, common_length
from mote.inference.threads import release_pool
from mote.models.kv_cache import cache_argument
from mote.models.rope import LengthDependentRope
from mote.tokens.routing import Markers

_CHUNK_TOKENS = 512  # prefill chunk size: larger raises throughput but delays decoding sequences
_PREFIXES = 32  # shared prefixes that are kept
_ENDED_TOKENS = 256  # tokens of ended sequences that are kept for each slot, beside their shared prefixes


@dataclass(frozen=True, eq=False)
class _Ended:
    """What an ended sequence leaves behind: the next stage of its chain, and a retry, begin with its tokens.

    Attributes:
        ids: Its tokens after the prefix.
        prefix: The shared prefix; there is one with the adapter and one without.
        cached: Their keys and values.
    """

    ids: list[int]
    prefix: Prefix
    cached: Prefix


_Chunks = list[tuple[RunningSequence, PrefillChunk]]


class Batcher(BatchLoop):
    """A running batch over one model, whose architecture can run in it (`mote.inference.compare_base`).

    While there are sequences, the batcher's own thread calls the model, and no other thread may.

    Args:
        model: A causal language model, with or without an adapter.
        slots: Maximum number of sequences in the batch.
        markers: Markers of an adapter with step experts, None without one.
        cache_tokens: Tokens that all slots may hold together; fewer sequences run at once if they are long.
    """

    def __init__(self, model: Any, slots: int, markers: Markers | None = None, cache_tokens: int = 1 << 16) -> None:
        super().__init__(slots, markers)
        self._model = model
        self._cache_tokens = cache_tokens
        self._cache = SlotCache(slots, model.config)
        self._cache_argument = cache_argument(model)
        self._prefixes: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()
        self._ended: list[_Ended] = []  # the oldest first
        self._rope = LengthDependentRope(model)
        release_pool()  # the caller's thread loaded the model

    def _admit(self) -> None:
        """Give free slots to waiting sequences."""
        while len(self._decoding) + len(self._prefilling) < self._cache.slots:
            with self._lock:
                if not self._waiting:
                    return
                sequence = self._waiting[0]
                candidates = [*self._decoding, *self._prefilling, sequence]
                longest = max(candidate.capacity for candidate in candidates)
                if len(candidates) > 1 and len(candidates) * longest > self._cache_tokens:
                    return
                self._waiting.popleft()
            if sequence.result.cancelled():
                continue
            self._set_steps(sequence)
            if 0 < sequence.request.shared < len(sequence.prompt) and self._is_short(len(sequence.prompt)):
                sequence.prefix = self._prefix(sequence)
            self._prefilling.append(sequence)
            self._resume(sequence)

    def _is_short(self, length: int) -> bool:
        return not self._rope or self._rope.is_short(length)

    def _prefix(self, sequence: RunningSequence) -> Prefix:
        """The shared prefix of a prompt, computed unless it is stored."""
        tokens = sequence.request.shared
        key = (sequence.request.adapted, *sequence.request.ids[:tokens])
        if key not in self._prefixes:
            slots = self._cache
            self._cache = SlotCache(1, self._model.config)  # the slots need not be as long as a prefix
            try:
                for start in range(0, tokens, _CHUNK_TOKENS):
                    stop = min(tokens, start + _CHUNK_TOKENS)
                    self._forward([], [(sequence, PrefillChunk(0, stop - start, 0, start, EMPTY))], None)
                self._prefixes[key] = self._cache.copy(0, tokens)
            finally:
                self._cache = slots
            while len(self._prefixes) > _PREFIXES:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(key)
        return self._prefixes[key]

    def _resume(self, sequence: RunningSequence) -> None:
        """Take over what an ended sequence left of the prompt's beginning, if any did."""
        if not sequence.prefix.length:
            return
        reusable = sequence.own[: len(sequence.own) - 1 - sequence.request.scored]  # the others are computed
        alike = [one for one in self._ended if one.prefix is sequence.prefix]
        found = [(common_length(one.ids, reusable), one.cached) for one in alike]
        tokens, cached = max(found, key=lambda pair: pair[0], default=(0, EMPTY))
        if tokens > 0:
            slot = len(self._decoding) + len(self._prefilling) - 1
            self._cache.paste(cached, slot, tokens, sequence.capacity)
            sequence.cached = tokens

    def _leave(self, sequence: RunningSequence) -> None:
        """Keep what a sequence that ends has cached, if it has a shared prefix: the stages of a chain do."""
        prefix = sequence.prefix
        if not prefix.length or self._rope:
            return
        ids = [*sequence.own, *sequence.generated][: sequence.cached]
        cached = self._cache.copy(self._decoding.index(sequence), sequence.cached)
        # What the stage before had left is the beginning of this.
        others = [one for one in self._ended if one.prefix is not prefix or one.ids != ids[: len(one.ids)]]
        self._ended = [*others, _Ended(ids, prefix, cached)]
        while sum(len(one.ids) for one in self._ended) > _ENDED_TOKENS * self._cache.slots:
            self._ended.pop(0)

    def _step(self) -> None:
        """One forward pass: a token of each decoding sequence, and as much of the waiting prompts as fits."""
        self._drop([s for s in (*self._decoding, *self._prefilling) if s.result.cancelled()])
        if self._rope:
            self._prefill_outdated()
        decoding = list(self._decoding)
        chunks = self._next_chunks()
        if not decoding and not chunks:
            return
        done = [(sequence, chunk) for sequence, chunk in chunks if chunk.end == len(sequence.own)]
        scored = [(sequence, *found) for sequence, chunk in chunks for found in sequence.scored(chunk)]
        first = len(decoding)
        keep = [*range(first), *(chunk.stop - 1 for _, chunk in done), *(index for _, index, _ in scored)]
        logits = self._forward(decoding, chunks, torch.tensor(keep, dtype=torch.long))
        for (sequence, _, token), logits_V in zip(scored, logits[first + len(done) :], strict=True):
            sequence.score += float(logits_V.float().log_softmax(0)[token])
        for sequence in decoding:
            sequence.cached += 1
        for sequence, chunk in chunks:
            sequence.cached += chunk.stop - chunk.start
        sequences = [*decoding, *(sequence for sequence, _ in done)]
        results = self._take(sequences, logits[: len(sequences)]) if sequences else []
        # Prefilled sequences become decoding ones: their slots come right after those, in order.
        self._decoding += [sequence for sequence, _ in done]
        self._prefilling = self._prefilling[len(done) :]
        ended = [sequence for sequence, result in results if not self._continues(sequence, result)]
        for sequence in ended:
            self._leave(sequence)
        self._drop(ended)

    def _next_chunks(self) -> _Chunks:
        """The next tokens of the prompts that are prefilled, at most a chunk in all."""
        chunks = []
        start = len(self._decoding)
        room = _CHUNK_TOKENS
        for slot, sequence in enumerate(self._prefilling, start):
            count = min(len(sequence.own) - sequence.cached, room)
            if count <= 0:
                break
            chunks.append((sequence, PrefillChunk(start, start + count, slot, sequence.cached, sequence.prefix)))
            start += count
            room -= count
        return chunks

    def _continues(self, sequence: RunningSequence, result: Any) -> bool:
        """Whether another request follows in the sequence's slot; otherwise its result is set."""
        following = self._following(sequence, result)
        if following is None:
            return False
        # The content of a slot is a pure function of the ids, so what the new prompt starts with is not recomputed.
        cached_ids = [*sequence.request.ids, *sequence.generated][: sequence.length]
        kept = common_length(cached_ids, following.ids[:-1])
        if self._rope and not (self._rope.is_short(sequence.length) and self._rope.is_short(len(following.ids))):
            kept = 0
            sequence.prefix = EMPTY
        sequence.request = following
        sequence.generated = []
        self._prefill_again(sequence, following.ids, kept)
        return True

    def _prefill_again(self, sequence: RunningSequence, prompt: Sequence[int], kept: int) -> None:
        """Let a decoding sequence prefill a prompt of which the first `kept` tokens are in the cache."""
        index = self._decoding.index(sequence)
        last = len(self._decoding) - 1
        self._cache.swap(index, last, max(sequence.cached, self._decoding[last].cached))
        self._decoding[index] = self._decoding[last]
        self._decoding.pop()
        self._prefilling.insert(0, sequence)  # their slots start after the last decoding one
        sequence.prompt = prompt
        sequence.cached = kept - sequence.prefix.length
        self._set_steps(sequence)

    def _prefill_outdated(self) -> None:
        """Prefill the sequences again whose keys change as they pass the original length of `longrope`."""
        for sequence in list(self._decoding):
            if self._rope.outdated(sequence.length, sequence.length + 1):
                sequence.prefix = EMPTY
                self._prefill_again(sequence, [*sequence.request.ids, *sequence.generated], 0)

    def _forward(self, decoding: list[RunningSequence], chunks: _Chunks, keep: Tensor | None) -> Tensor:
        """Logits (len(keep), V) at the kept positions; with keep=None the result is unused."""
        if not self._rope:
            return self._run_model(decoding, chunks, keep)
        regimes = {self._rope.regime(s.length + 1) for s in decoding}
        regimes |= {self._rope.regime(sequence.length_at(chunk)) for sequence, chunk in chunks}
        if regimes == {self._rope.regime(0)}:
            self._rope.reset()
            return self._run_model(decoding, chunks, keep)
        return self._forward_by_regime(decoding, chunks, keep)

    def _forward_by_regime(self, decoding: list[RunningSequence], chunks: _Chunks, keep: Tensor | None) -> Tensor:
        """One forward pass for each rope regime; a decoded token is a chunk of one token there."""
        decoded = [
            (sequence, PrefillChunk(slot, slot + 1, slot, sequence.cached, sequence.prefix))
            for slot, sequence in enumerate(decoding)
        ]
        groups: dict[tuple[int, ...], _Chunks] = {}
        for sequence, chunk in [*decoded, *chunks]:
            regime = self._rope.regime(sequence.length_at(chunk))
            groups.setdefault(regime, []).append((sequence, chunk))
        positions = [] if keep is None else keep.tolist()
        logits: dict[int, Tensor] = {}
        for group in groups.values():
            moved: _Chunks = []
            kept: list[tuple[int, int]] = []  # position in the whole batch, and in this forward pass
            start = 0
            for sequence, chunk in group:
                shift = start - chunk.start
                moved.append((sequence, replace(chunk, start=start, stop=chunk.stop + shift)))
                kept += [(position, position + shift) for position in positions if chunk.start <= position < chunk.stop]
                start = chunk.stop + shift
            for sequence, chunk in group:
                if chunk.end < len(sequence.own) and not self._rope.is_short(len(sequence.prompt)):
                    # The prompt's last token shows the rotary embedding its length; its keys are written again later.
                    last = PrefillChunk(start, start + 1, chunk.slot, len(sequence.own) - 1, chunk.prefix)
                    moved.append((sequence, last))
                    start += 1
            self._rope.reset()
            found = self._run_model([], moved, torch.tensor([index for _, index in kept], dtype=torch.long))
            logits |= {position: logits_V for (position, _), logits_V in zip(kept, found, strict=True)}
        return torch.stack([logits[position] for position in positions]) if positions else found

    def _run_model(self, decoding: list[RunningSequence], chunks: _Chunks, keep: Tensor | None) -> Tensor:
        """One forward pass of the model; see `_forward`."""
        ids = []
        slots = []
        offsets = []
        positions = []
        steps = []
        for slot, sequence in enumerate(decoding):
            ids.append(sequence.generated[-1])
            slots.append(slot)
            offsets.append(sequence.cached)
            positions.append(sequence.length)
            steps.append(sequence.step)
        for sequence, chunk in chunks:
            begin = chunk.prefix.length + chunk.offset
            end = chunk.prefix.length + chunk.end
            if begin < len(sequence.prompt):
                ids += sequence.prompt[begin:end]
                steps += sequence.steps[begin:end]
            else:
                ids.append(sequence.generated[-1])
                steps.append(sequence.step)
            slots += [chunk.slot] * (end - begin)
            offsets += range(chunk.offset, chunk.end)
            positions += range(begin, end)
        sequences = [*decoding, *(sequence for sequence, _ in chunks)]
        self._cache.reserve(max(slots) + 1, max(offsets) + 1, max(sequence.capacity for sequence in sequences))
        device = self._model.device
        lengths = [sequence.cached + 1 for sequence in decoding]
        plan = BatchPlan(
            self._cache,
            len(decoding),
            torch.tensor(slots, device=device),
            torch.tensor(offsets, device=device),
            torch.tensor(positions, device=device),
            torch.tensor(lengths, device=device, dtype=torch.long),
            max(lengths, default=0),
            by_prefix(decoding, device),
            max((sequence.prefix.length for sequence in decoding), default=0),
            [chunk for _, chunk in chunks],
        )
        given: dict[str, Any] = {self._cache_argument: self._cache}
        if self._markers is not None:
            given |= {"step_ids": torch.tensor([steps], device=device), "document_ids": plan.slots[None]}
        with executing(plan), _attention_of(self._model.config, SLOTS):
            logits: Tensor = self._model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=plan.positions[None],
                use_cache=True,
                # A tensor: given a number, Gemma 4 leaves tokens out of the layers that share keys.
                logits_to_keep=(torch.tensor([0]) if keep is None else keep).to(device),
                **given,
            ).logits[0]
        self.tokens_computed += len(ids)
        return logits

    def _drop(self, gone: list[RunningSequence]) -> None:
        """Free the slots of these sequences; the last decoding or prefilling one moves into the gap."""
        for sequence in gone:
            if sequence in self._decoding:
                gap = self._decoding.index(sequence)
                last = self._decoding.pop()
                if last is not sequence:
                    self._cache.move(len(self._decoding), gap, last.cached)
                    self._decoding[gap] = last
                if self._prefilling:
                    first = self._prefilling.pop()
                    self._prefilling.insert(0, first)
                    self._cache.move(len(self._decoding) + len(self._prefilling), len(self._decoding), first.cached)
            else:
                gap = self._prefilling.index(sequence)
                last = self._prefilling.pop()
                if last is not sequence:
                    base = len(self._decoding)
                    self._cache.move(base + len(self._prefilling), base + gap, last.cached)
                    self._prefilling[gap] = last


@contextmanager
def _attention_of(config: Any, name: str) -> Iterator[None]:
    """Let the model use this attention for one forward pass: other callers find the attention they set."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
