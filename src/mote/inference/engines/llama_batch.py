"""Continuous batching over llama.cpp: the in-process engine's requests, grammars and sampling on GGUF files.

A slot is a sequence of llama.cpp's KV cache. A finished sequence's tokens stay cached while there is room, so that a
request with the same prefix does not recompute it; a prefix that several sequences share is stored once.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from mote.core.errors import UserError
from mote.inference.batch_loop import BatchLoop
from mote.inference.engines.llama_library import BATCH, CacheType, LlamaModel
from mote.inference.kv_slots import EMPTY, PrefillChunk
from mote.inference.request import Request
from mote.inference.sequence import RunningSequence, common_length
from mote.tokens.routing import NO_STEP, Markers

MOST_SLOTS = 32
# Every token costs 0.5 us for each token in the cache, of whatever sequence, and beyond 8 rows a forward pass is hardly
# cheaper a row; so this many long prompts at once are the fastest (docs/decisions/0046).
CHAIN_SLOTS = 8
_FEW = 3  # up to this many rows, one call per row is faster than one call for all (docs/decisions/0046)
_PREFIXES = 8  # shared prefixes that are kept
_SPARE = 4  # ended sequences kept beside a full batch: a retry begins as they do
_CACHE_UNIT = 2048  # the cache holds a multiple of this many tokens


@dataclass(frozen=True)
class GgufFiles:
    """The files that compute a model.

    Attributes:
        model: The model's GGUF.
        loras: LoRA of the question and of each step; empty for a base model and for one file with all steps.
        base_tokens: In one file with all steps: the token that opens every prompt, and the one that stands in its
            place to turn the experts off; the latter is never generated.
        cache: Type of keys and values.
    """

    model: Path
    loras: tuple[Path, ...] = ()
    base_tokens: tuple[int, int] | None = None
    cache: CacheType = "f16"


@dataclass(eq=False)
class _Slot:
    """A sequence of the cache.

    Attributes:
        number: llama.cpp's number of it.
        ids: Tokens whose keys and values it holds.
        adapted: Whether the adapter was on.
        shared: How many of the tokens are stored in another slot, that of a shared prefix.
        prefix: That slot.
    """

    number: int
    ids: list[int]
    adapted: bool = True
    shared: int = 0
    prefix: "_Slot | None" = None


@dataclass(frozen=True)
class _Chunk:
    """Tokens that a slot computes in a forward pass: ids, the step that reads them, and which logits are needed."""

    slot: _Slot
    ids: list[int]
    step: int
    keep: list[int]


class LlamaBatcher(BatchLoop):
    """A running batch over GGUF files; any thread may submit requests.

    Args:
        files: The model.
        slots: Maximum number of sequences in the batch; at most `MOST_SLOTS` run at once.
        markers: Markers of an adapter with step experts, None without one.
        threads: Threads of a forward pass; by default those of torch.
        cache_tokens: Tokens that the cache may hold; a longer request gets what it needs when it is alone.

    Raises:
        UserError: llama.cpp is not installed.
        MoteError: It cannot load the files.
    """

    def __init__(
        self,
        files: GgufFiles,
        slots: int,
        markers: Markers | None = None,
        *,
        threads: int | None = None,
        cache_tokens: int = 1 << 14,
    ) -> None:
        super().__init__(min(slots, MOST_SLOTS), markers)
        self._files = files
        self._cache_tokens = cache_tokens
        self._model = LlamaModel(files.model, threads or torch.get_num_threads(), files.loras)
        self._room = 0  # tokens that the cache can hold; 0: it has to be made
        self._lora: int | None = None
        self._slots_of: dict[RunningSequence, _Slot] = {}
        self._idle: list[_Slot] = []  # the longest unused first
        self._prefixes: list[_Slot] = []  # of shared prefixes, the longest unused first

    @override
    def submit(self, request: Request) -> "Future[Any]":
        """See `BatchLoop.submit`.

        Raises:
            UserError: The mode is `base`, and the prompt does not begin with the token that turns the experts off.
        """
        tokens = self._files.base_tokens
        if tokens is not None and not request.adapted and request.ids[0] != tokens[0]:
            raise UserError(
                "mode: with one GGUF file the mode 'base' needs prompts that begin as all others do, and this dialogue "
                "does not; leave out its system message, or --engine llamacpp"
            )
        return super().submit(request)

    @override
    def close(self) -> None:
        super().close()
        self._model.close()

    @override
    def _fail(self, error: BaseException) -> None:
        super()._fail(error)
        self._slots_of = {}
        self._idle = []
        self._prefixes = []
        self._room = 0

    @override
    def _admit(self) -> None:
        """Give free slots to waiting sequences while the cache has room."""
        while len(self._slots_of) < self._slots:
            with self._lock:
                if not self._waiting:
                    return
                sequence = self._waiting[0]
                if self._slots_of and not self._fits(sequence):
                    return
                self._waiting.popleft()
            if sequence.result.cancelled():
                continue
            if not self._slots_of and not self._fits(sequence):
                self._open(max(sequence.capacity, min(sequence.capacity * self._slots, self._cache_tokens)))
            self._set_steps(sequence)
            self._prefilling.append(sequence)  # from here on a failure of the batch reaches it
            self._place(sequence)

    def _open(self, tokens: int) -> None:
        """Make an empty cache for this many tokens."""
        self._room = 0
        tokens = -(-tokens // _CACHE_UNIT) * _CACHE_UNIT
        own = self._slots + _SPARE
        self._model.open(own + _PREFIXES, tokens, self._files.cache)
        self._room = tokens
        self._lora = None
        slots = [_Slot(number, []) for number in range(own + _PREFIXES)]
        self._idle, self._prefixes = slots[:own], slots[own:]

    def _fits(self, sequence: RunningSequence) -> bool:
        """Whether there is room for one more sequence, with what idle slots hold given up if needed."""
        running = sum(other.capacity - slot.shared for other, slot in self._slots_of.items())
        in_use = {slot.prefix for slot in self._slots_of.values()}
        spare = [*self._idle, *(slot for slot in self._prefixes if slot not in in_use)]
        kept = sum(len(slot.ids) for slot in (*self._idle, *self._prefixes))
        for slot in spare:
            if running + sequence.capacity + kept <= self._room:
                break
            kept -= len(slot.ids)
            self._cut(slot, 0)
        return running + sequence.capacity + kept <= self._room

    def _place(self, sequence: RunningSequence) -> None:
        """Assign an idle slot to a sequence, and reuse the cached tokens of its prompt."""
        adapted = sequence.request.adapted
        ids = self._file_ids(sequence)
        prefix = self._shared_prefix(sequence, ids)
        known = [*([prefix] if prefix else []), *self._slots_of.values(), *self._idle]
        source = max(known, key=lambda slot: self._common(slot, sequence.request, ids), default=None)
        found = self._common(source, sequence.request, ids) if source else 0
        slot = source if source in self._idle else self._idle[0]
        assert slot is not None
        self._idle.remove(slot)
        if slot is source:
            self._cut(slot, found)
        else:
            self._cut(slot, 0)
            if source and found:
                self._model.copy(source.number, slot.number, found)
                slot.ids = ids[:found]
        slot.adapted = adapted
        slot.prefix = prefix if source is prefix else None
        slot.shared = found if slot.prefix else 0
        sequence.cached = found
        self._slots_of[sequence] = slot

    def _common(self, slot: _Slot, request: Request, ids: Sequence[int]) -> int:
        """How many tokens of a prompt a slot holds; the last one is always computed, and so are scored ones."""
        if slot.adapted != request.adapted or not self._model.keeps_prefixes:
            return 0
        return common_length(slot.ids, ids[: len(ids) - 1 - request.scored])

    def _shared_prefix(self, sequence: RunningSequence, ids: list[int]) -> _Slot | None:
        """The slot that holds the prefix a prompt shares with others; computed unless it is cached."""
        length = sequence.request.shared
        adapted = sequence.request.adapted
        if not (0 < length < len(ids) and self._model.keeps_prefixes):
            return None
        wanted = ids[:length]
        slot = next((slot for slot in self._prefixes if slot.ids == wanted and slot.adapted == adapted), None)
        if slot is None:
            in_use = {slot.prefix for slot in self._slots_of.values()}
            slot = next((slot for slot in self._prefixes if slot not in in_use), None)
            if slot is None:
                return None
            self._cut(slot, 0)
            slot.adapted = adapted
            for start in range(0, length, BATCH):
                for chunk in self._runs(slot, wanted[start : start + BATCH], sequence.steps[start:]):
                    self._compute([chunk])
        self._prefixes.remove(slot)
        self._prefixes.append(slot)
        return slot

    def _cut(self, slot: _Slot, length: int) -> None:
        """Keep a slot's first tokens only."""
        if len(slot.ids) > length:
            self._model.remove(slot.number, length)
            del slot.ids[length:]

    def _file_ids(self, sequence: RunningSequence) -> list[int]:
        """A prompt's ids for the file: in one file with all steps, another first token selects the base model."""
        ids = list(sequence.prompt)
        if self._files.base_tokens is not None and not sequence.request.adapted:
            ids[0] = self._files.base_tokens[1]
        return ids

    @override
    def _step(self) -> None:
        self._drop([s for s in (*self._decoding, *self._prefilling) if s.result.cancelled()])
        decoding = list(self._decoding)
        chunks = [_Chunk(self._slots_of[s], [s.generated[-1]], s.step, [0]) for s in decoding]
        prompts = self._next_prompts(BATCH - len(chunks))
        if not chunks and not prompts:
            return
        logits = self._compute([*chunks, *(chunk for _, chunk in prompts)])
        for sequence in decoding:
            sequence.cached += 1
        ready = list(zip(decoding, (found[0] for found in logits), strict=False))
        for (sequence, chunk), found in zip(prompts, logits[len(decoding) :], strict=True):
            part = PrefillChunk(0, len(chunk.ids), 0, sequence.cached, EMPTY)
            for row, (_, token) in zip(found, sequence.scored(part), strict=False):
                sequence.score += float(row.log_softmax(0)[token])
            sequence.cached += len(chunk.ids)
            if sequence.cached == len(sequence.prompt):
                ready.append((sequence, found[-1]))
                self._prefilling.remove(sequence)
                self._decoding.append(sequence)
        if ready:
            results = self._take([sequence for sequence, _ in ready], torch.stack([row for _, row in ready]))
            self._drop([sequence for sequence, result in results if not self._continues(sequence, result)])

    def _next_prompts(self, room: int) -> list[tuple[RunningSequence, _Chunk]]:
        """The next tokens of the prompts that are prefilled, at most `room` in all; of one step for each prompt."""
        prompts = []
        for sequence in self._prefilling:
            slot = self._slots_of[sequence]
            ids = self._file_ids(sequence)[sequence.cached : sequence.cached + room]
            if not ids:
                break
            chunk = next(self._runs(slot, ids, sequence.steps[sequence.cached :]))
            part = PrefillChunk(0, len(chunk.ids), 0, sequence.cached, EMPTY)
            keep = [index for index, _ in sequence.scored(part)]
            if part.end == len(sequence.prompt):
                keep.append(len(chunk.ids) - 1)
            prompts.append((sequence, _Chunk(slot, chunk.ids, chunk.step, keep)))
            room -= len(chunk.ids)
        return prompts

    def _runs(self, slot: _Slot, ids: list[int], steps: Sequence[int]) -> Iterator[_Chunk]:
        """The ids as chunks of one step each; a single chunk if the file routes tokens by itself."""
        start = 0
        while start < len(ids):
            stop = len(ids)
            if self._files.loras:
                stop = next((i for i in range(start, len(ids)) if steps[i] != steps[start]), len(ids))
            yield _Chunk(slot, ids[start:stop], steps[start] if steps else NO_STEP, [])
            start = stop

    def _compute(self, chunks: Sequence[_Chunk]) -> list[list[Tensor]]:
        """Compute chunks with the experts of their steps; the logits (V) that each needs."""
        steps = sorted({chunk.step for chunk in chunks}) if self._files.loras else [NO_STEP]
        logits: dict[int, list[Tensor]] = {}
        for step in steps:
            part = [i for i, chunk in enumerate(chunks) if not self._files.loras or chunk.step == step]
            self._use(step)
            tokens = sum(len(chunks[i].ids) for i in part)
            calls = [[i] for i in part] if tokens == len(part) <= _FEW else [part]
            for call in calls:
                logits |= zip(call, self._call([chunks[i] for i in call]), strict=True)
        return [logits[i] for i in range(len(chunks))]

    def _use(self, step: int) -> None:
        """Let the experts of a step compute the next tokens."""
        lora = step if self._files.loras and step != NO_STEP else None
        if lora != self._lora:
            self._model.use(lora)
            self._lora = lora

    def _call(self, chunks: Sequence[_Chunk]) -> list[list[Tensor]]:
        """One forward pass of llama.cpp."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        keep: list[int] = []
        for chunk in chunks:
            keep += [len(ids) + index for index in chunk.keep]
            positions += range(len(chunk.slot.ids), len(chunk.slot.ids) + len(chunk.ids))
            slots += [chunk.slot.number] * len(chunk.ids)
            ids += chunk.ids
        rows = iter(self._model.decode(ids, positions, slots, keep))
        self.tokens_computed += len(ids)
        for chunk in chunks:
            chunk.slot.ids += chunk.ids
        vocabulary = self._files.base_tokens[1] if self._files.base_tokens else self._model.vocabulary
        return [[next(rows)[:vocabulary] for _ in chunk.keep] for chunk in chunks]

    def _continues(self, sequence: RunningSequence, result: Any) -> bool:
        """Whether another request follows in the sequence's slot; otherwise its result is set."""
        following = self._following(sequence, result)
        if following is None:
            return False
        slot = self._slots_of[sequence]
        sequence.request = following
        sequence.prompt = following.ids
        sequence.generated = []
        sequence.cached = self._common(slot, following, self._file_ids(sequence))
        self._cut(slot, sequence.cached)
        self._set_steps(sequence)
        self._decoding.remove(sequence)
        self._prefilling.insert(0, sequence)
        return True

    def _drop(self, gone: Iterable[RunningSequence]) -> None:
        """Free the slots of these sequences; their tokens stay cached for now."""
        for sequence in gone:
            (self._decoding if sequence in self._decoding else self._prefilling).remove(sequence)
            slot = self._slots_of.pop(sequence)
            slot.prefix = None
            slot.shared = 0
            self._idle.append(slot)
