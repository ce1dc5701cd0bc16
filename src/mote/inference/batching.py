"""Continuous batching in this process: rows join a running batch as soon as another has ended.

One forward pass writes one token of every row and reads some more of the prompts that wait, so that short rows do not
wait for long ones and no row waits for a prompt. It knows nothing of chains or chats: token ids go in and come out.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from mote.core.errors import UserError
from mote.core.generation import GREEDY, Sampling
from mote.inference.kv_slots import EMPTY, SLOTS, Pass, Prefix, Reading, SlotCache, running
from mote.inference.sampling import draw
from mote.inference.threads import release_pool
from mote.tokens.routing import NO_STEP, QUESTION, Markers, next_step, step_ids

_READ_TOKENS = 512  # tokens of prompts read in one pass: more is faster, and longer for the rows that are written
_PREFIXES = 32  # shared beginnings that are kept


class Grammar(Protocol):
    """Which token a row may write next."""

    def mask(self, logits_V: Tensor, written: Sequence[int]) -> Tensor:
        """The logits with what may not come behind these ids at minus infinity."""

    def ended(self, written: Sequence[int]) -> bool:
        """Whether the text ends with the last of these ids."""


@dataclass(eq=False)
class Request:
    """A text to go on with.

    Attributes:
        ids: Token ids of the prompt.
        grammar: What may be written, and when it ends.
        limit: Tokens that may be written.
        shared: Tokens that other prompts begin with as well; they are computed and kept once.
        sampling: How to sample; its seed is this request's own.
        frequency_penalty: Taken from a token's logit for each time it was written before.
        adapted: Read and write with the adapter, where there is one.
        words: Write nothing; give the probability of the first of these token ids against the second.
        scored: Write nothing; give the mean log-probability, in nats, of so many ids at the end of the prompt, which
            stand behind `shared` ones and one more.
        on_token: Called with each written token, in the batcher's thread.
        follow: Called with the result, in the batcher's thread; it must not raise. Gives the request that the row goes
            on with, whose prompt begins with this one's, or the result of the row.
        extra: Tokens that such requests may hold beyond `limit`.
    """

    ids: Sequence[int]
    grammar: Grammar
    limit: int
    shared: int = 0
    sampling: Sampling = GREEDY
    frequency_penalty: float = 0.0
    adapted: bool = True
    words: tuple[int, int] | None = None
    scored: int = 0
    on_token: Callable[[Any], None] | None = None
    follow: "Callable[[Any], Request | Any] | None" = None
    extra: int = 0


@dataclass(eq=False)
class _Row:
    request: Request
    result: "Future[Any]"
    prefix: Prefix = EMPTY
    read: int = 0  # tokens in its slot
    written: list[int] = field(default_factory=list)
    step: int = QUESTION  # of the last token
    steps: list[int] = field(default_factory=list)  # of each token of the prompt
    score: float = 0.0  # log-probability of the scored ids that were read

    @property
    def own(self) -> Sequence[int]:
        """The prompt behind the prefix."""
        return self.request.ids[self.prefix.length :]

    @property
    def most(self) -> int:
        """Tokens that its slot may have to hold."""
        return len(self.request.ids) - self.prefix.length + self.request.limit + self.request.extra


class Batcher:
    """A running batch over one model; requests come from any thread.

    While there are rows, the model is called from a thread of the batcher's own and must not be called from another.

    Args:
        model: A causal language model, with an adapter or without.
        slots: Rows at most.
        markers: The markers of an adapter of step experts, None where there is none.
        cache_tokens: Tokens that all slots may hold together; fewer rows run where they are long.

    Raises:
        UserError: The model's attention is its own and cannot be told which tokens belong to which row.
    """

    def __init__(self, model: Any, slots: int, markers: Markers | None = None, cache_tokens: int = 1 << 16) -> None:
        if not getattr(model, "_supports_attention_backend", False):
            raise UserError(
                f"model: {type(model).__name__} computes attention in a way of its own that continuous batching cannot "
                "use; serve it with vLLM or another OpenAI-compatible server and give its address with --engine"
            )
        self.tokens_computed = 0
        self._model, self._markers, self._cache_tokens = model, markers, cache_tokens
        self._cache = SlotCache(slots)
        self._prefixes: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()
        self._writing: list[_Row] = []  # row i is in slot i ...
        self._reading: list[_Row] = []  # ... and those whose prompt is being read in the slots behind
        self._waiting: deque[_Row] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None  # there is one while there are rows
        release_pool()  # whoever makes this has loaded the model

    def submit(self, request: Request) -> "Future[Any]":
        """Queue a request.

        Returns:
            A future of the written ids, of the probability where `words` are given, or of the mean log-probability
            where ids are `scored`. Cancelling it ends the row.
        """
        row = _Row(request, Future())
        release_pool()
        with self._lock:
            self._waiting.append(row)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True, name="mote-batcher")
                self._thread.start()
        return row.result

    @property
    def rows(self) -> tuple[int, int]:
        """How many rows are in the batch, and how many wait."""
        return len(self._writing) + len(self._reading), len(self._waiting)

    def wait(self) -> None:
        """Wait until there are no rows and the model is free."""
        while (thread := self._thread) is not None:
            thread.join()

    def _run(self) -> None:
        with torch.inference_mode():
            while self._work_left():
                try:
                    self._admit()
                    self._step()
                except BaseException as error:  # the next request finds an empty batch
                    self._fail(error)

    def _work_left(self) -> bool:
        with self._lock:
            if self._writing or self._reading or self._waiting:
                return True
            self._thread = None
            return False

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            rows = [*self._writing, *self._reading, *self._waiting]
            self._writing, self._reading = [], []
            self._waiting.clear()
        for row in rows:
            if row.result.set_running_or_notify_cancel():
                row.result.set_exception(error)

    def _admit(self) -> None:
        """Give waiting rows the free slots."""
        while len(self._writing) + len(self._reading) < self._cache.slots:
            with self._lock:
                if not self._waiting:
                    return
                row = self._waiting[0]
                rows = [*self._writing, *self._reading, row]
                longest = max(r.most for r in rows)
                if len(rows) > 1 and len(rows) * longest > self._cache_tokens:
                    return
                self._waiting.popleft()
            if row.result.cancelled():
                continue
            row.steps = self._steps(row.request)
            row.step = row.steps[-1] if row.steps else QUESTION
            if 0 < row.request.shared < len(row.request.ids):
                row.prefix = self._prefix(row)
            self._reading.append(row)
            self._cache.reserve(len(self._writing) + len(self._reading), row.most)

    def _steps(self, request: Request) -> list[int]:
        """The step of each token of a prompt."""
        if self._markers is None:
            return []
        if not request.adapted:
            return [NO_STEP] * len(request.ids)
        steps: list[int] = step_ids(torch.tensor([list(request.ids)]), self._markers)[0].tolist()
        return steps

    def _prefix(self, row: _Row) -> Prefix:
        """The shared beginning of a prompt, computed where it is not there yet."""
        key = (row.request.adapted, *row.request.ids[: row.request.shared])
        if key not in self._prefixes:
            tokens, slot = row.request.shared, len(self._writing) + len(self._reading)
            self._cache.reserve(slot + 1, tokens)
            for start in range(0, tokens, _READ_TOKENS):
                stop = min(tokens, start + _READ_TOKENS)
                self._forward([], [(row, Reading(0, stop - start, slot, start, EMPTY))], None)
            self._prefixes[key] = self._cache.prefix(slot, tokens)
            while len(self._prefixes) > _PREFIXES:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(key)
        return self._prefixes[key]

    def _step(self) -> None:
        """One pass: a token of every written row, and as much of the waiting prompts as fits."""
        self._drop([row for row in (*self._writing, *self._reading) if row.result.cancelled()])
        writing, parts, at = list(self._writing), [], len(self._writing)
        room, first = _READ_TOKENS, at
        for slot, row in enumerate(self._reading, len(writing)):
            count = min(len(row.own) - row.read, room)
            if count <= 0:
                break
            parts.append((row, Reading(at, at + count, slot, row.read, row.prefix)))
            at, room = at + count, room - count
        if at == 0:
            return
        read = [(row, part) for row, part in parts if part.place + part.stop - part.start == len(row.own)]
        scored = [(row, *found) for row, part in parts for found in _scored(row, part)]
        places = [*range(first), *(part.stop - 1 for _, part in read), *(place for _, place, _ in scored)]
        logits = self._forward(writing, parts, torch.tensor(places, dtype=torch.long))
        for (row, _, token), logits_V in zip(scored, logits[first + len(read) :], strict=True):
            row.score += float(logits_V.float().log_softmax(0)[token])
        for row in writing:
            row.read += 1
        for row, part in parts:
            row.read += part.stop - part.start
        rows = [*writing, *(row for row, _ in read)]
        results = self._take(rows, logits[: len(rows)]) if rows else []
        # Prompts that are read become written rows: they lie in the slots right behind those, in order.
        self._writing += [row for row, _ in read]
        self._reading = self._reading[len(read) :]
        self._drop([row for row, result in results if not self._goes_on(row, result)])

    def _goes_on(self, row: _Row, result: Any) -> bool:
        """Whether another request follows in the row's slot; else its result is given."""
        following = row.request.follow(result) if row.request.follow is not None else result
        if not isinstance(following, Request):
            if row.result.set_running_or_notify_cancel():  # False: it was cancelled meanwhile
                row.result.set_result(following)
            return False
        # What lies in the slot is a pure function of the ids: what the new prompt begins with is not computed again.
        held, begin = [*row.request.ids, *row.written][: row.prefix.length + row.read], following.ids[:-1]
        same = next(
            (i for i, (a, b) in enumerate(zip(held, begin, strict=False)) if a != b), min(len(held), len(begin))
        )
        place, last = self._writing.index(row), len(self._writing) - 1
        self._cache.swap(place, last, max(row.read, self._writing[last].read))
        self._writing[place] = self._writing[last]
        self._writing.pop()
        self._reading.insert(0, row)  # which begin in the slot behind the last written row's
        row.request, row.read, row.written = following, same - row.prefix.length, []
        row.steps = self._steps(following)
        row.step = row.steps[-1] if row.steps else QUESTION
        self._cache.reserve(len(self._writing) + len(self._reading), row.most)
        return True

    def _forward(self, writing: list[_Row], parts: list[tuple[_Row, Reading]], keep: Tensor | None) -> Tensor:
        """Logits (len(keep), V) of the kept tokens; without any, of none that matters."""
        ids, slots, places, positions, steps = [], [], [], [], []
        for slot, row in enumerate(writing):
            ids.append(row.written[-1])
            slots.append(slot)
            places.append(row.read)
            positions.append(row.prefix.length + row.read)
            steps.append(row.step)
        for row, part in parts:
            begin = part.prefix.length + part.place
            end = begin + part.stop - part.start
            ids += row.request.ids[begin:end]
            slots += [part.slot] * (end - begin)
            places += range(part.place, part.place + end - begin)
            positions += range(begin, end)
            steps += row.steps[begin:end]
        device = self._model.device
        lengths = [row.read + 1 for row in writing]
        work = Pass(
            self._cache,
            len(writing),
            torch.tensor(slots, device=device),
            torch.tensor(places, device=device),
            torch.tensor(lengths, device=device, dtype=torch.long),
            max(lengths, default=0),
            _groups(writing, device),
            max((row.prefix.length for row in writing), default=0),
            [part for _, part in parts],
        )
        routing = {}
        if self._markers is not None:
            routing = {"step_ids": torch.tensor([steps], device=device), "document_ids": work.slots[None]}
        with running(work), _attention_of(self._model.config):
            logits: Tensor = self._model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.tensor([positions], device=device),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1 if keep is None else keep.to(device),
                **routing,
            ).logits[0]
        self.tokens_computed += len(ids)
        return logits

    def _take(self, rows: list[_Row], logits_B_V: Tensor) -> list[tuple[_Row, Any]]:
        """Choose the next token of each row; gives the rows that have ended, with their results."""
        ended: list[tuple[_Row, Any]] = []
        for row, logits_V in zip(rows, logits_B_V, strict=True):
            if row.request.words is not None:
                ended.append((row, float(logits_V[list(row.request.words)].float().softmax(0)[0])))
            elif row.request.scored:
                ended.append((row, row.score / row.request.scored))
        places = [i for i, row in enumerate(rows) if row.request.words is None and not row.request.scored]
        if not places:
            return ended
        rows = [rows[i] for i in places]
        masked = torch.stack([_masked(logits_B_V[i], row) for i, row in zip(places, rows, strict=True)])
        tokens = draw(masked, [row.request.sampling for row in rows], [len(row.written) for row in rows])
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.written.append(token)
            if self._markers is not None and row.request.adapted:
                row.step = next_step(row.step, token, self._markers)
            if row.request.on_token is not None:
                row.request.on_token(token)
            if row.request.grammar.ended(row.written) or len(row.written) == row.request.limit:
                ended.append((row, row.written))
        return ended

    def _drop(self, gone: list[_Row]) -> None:
        """Free the slots of these rows; the last row of their kind moves into the gap."""
        for row in gone:
            if row in self._writing:
                gap, last = self._writing.index(row), self._writing.pop()
                if last is not row:
                    self._cache.move(len(self._writing), gap, last.read)
                    self._writing[gap] = last
                if self._reading:
                    first = self._reading.pop()
                    self._reading.insert(0, first)
                    self._cache.move(len(self._writing) + len(self._reading), len(self._writing), first.read)
            else:
                gap, last = self._reading.index(row), self._reading.pop()
                if last is not row:
                    base = len(self._writing)
                    self._cache.move(base + len(self._reading), base + gap, last.read)
                    self._reading[gap] = last


@contextmanager
def _attention_of(config: Any) -> Iterator[None]:
    """Let the model use the attention of slots for one pass: whoever calls it in between finds it as it was."""
    before = config._attn_implementation
    config._attn_implementation = SLOTS
    try:
        yield
    finally:
        config._attn_implementation = before


def _scored(row: _Row, part: Reading) -> Iterator[tuple[int, int]]:
    """The places in a pass whose logits are of scored ids, each with its id."""
    ids = row.request.ids
    following = part.prefix.length + part.place - part.start + 1  # of a place in the pass: where the next id stands
    first, last = len(ids) - row.request.scored - following, len(ids) - following
    for place in range(max(part.start, first), min(part.stop, last)):
        yield place, ids[place + following]


def _masked(logits_V: Tensor, row: _Row) -> Tensor:
    """The logits of a row's next token, with what the grammar forbids at minus infinity."""
    penalty = row.request.frequency_penalty
    if penalty and row.written:
        ids = torch.tensor(row.written, device=logits_V.device)
        logits_V = logits_V.index_add(0, ids, logits_V.new_full((len(ids),), -penalty))
    return row.request.grammar.mask(logits_V, row.written)


def _groups(rows: list[_Row], device: torch.device) -> list[tuple[Prefix, Tensor | slice]]:
    """The prefixes of written rows, each with the places of its rows."""
    members: dict[Prefix, list[int]] = {}
    for place, row in enumerate(rows):
        members.setdefault(row.prefix, []).append(place)
    if len(members) == 1:
        return [(prefix, slice(None)) for prefix in members]
    return [(prefix, torch.tensor(places, device=device)) for prefix, places in members.items()]
