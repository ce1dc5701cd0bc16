"""The loop of continuous batching, whatever computes the logits: requests wait, join the batch, get tokens and leave.

It knows nothing of models: subclasses assign slots and compute logits.
"""

import atexit
import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from mote.inference.request import Request
from mote.inference.sequence import RunningSequence, draw
from mote.inference.threads import release_pool
from mote.tokens.routing import NO_STEP, QUESTION, Markers, next_step, step_ids

_LOOPS: "weakref.WeakSet[BatchLoop]" = weakref.WeakSet()


class BatchLoop(ABC):
    """A running batch; any thread may submit requests.

    Args:
        slots: Maximum number of sequences in the batch.
        markers: Markers of an adapter with step experts, None without one.
    """

    def __init__(self, slots: int, markers: Markers | None) -> None:
        self.tokens_computed = 0
        self._slots = slots
        self._markers = markers
        self._decoding: list[RunningSequence] = []
        self._prefilling: list[RunningSequence] = []
        self._waiting: deque[RunningSequence] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None  # runs while there are sequences
        self._running = False
        self._stopping = False
        _LOOPS.add(self)

    @abstractmethod
    def _admit(self) -> None:
        """Let waiting sequences join the batch."""

    @abstractmethod
    def _step(self) -> None:
        """One forward pass: a token of each decoding sequence, and as much of the waiting prompts as fits."""

    def submit(self, request: Request) -> "Future[Any]":
        """Queue a request.

        Returns:
            A future of the generated ids, of the probability if `words` are given, or of the mean log-probability if
            ids are `scored`. Cancelling it ends the sequence.
        """
        sequence = RunningSequence(request, Future(), request.ids)
        release_pool()
        with self._lock:
            self._waiting.append(sequence)
            if not self._running:
                self._running = True
                self._thread = threading.Thread(target=self._run, daemon=True, name="mote-batcher")
                self._thread.start()
        return sequence.result

    @property
    def rows(self) -> tuple[int, int]:
        """Number of sequences in the batch, and number waiting."""
        return len(self._decoding) + len(self._prefilling), len(self._waiting)

    def wait(self) -> None:
        """Wait until there are no sequences and the model is free."""
        while (thread := self._thread) is not None and thread.is_alive():
            thread.join()

    def close(self) -> None:
        """Wait until there are no sequences, and release memory that is not Python's."""
        self.wait()

    def _run(self) -> None:
        with torch.inference_mode():
            while self._has_work():
                try:
                    self._admit()
                    self._step()
                except BaseException as error:  # the next request finds an empty batch
                    self._fail(error)

    def _has_work(self) -> bool:
        with self._lock:
            self._running = not self._stopping and bool(self._decoding or self._prefilling or self._waiting)
            return self._running

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            sequences = [*self._decoding, *self._prefilling, *self._waiting]
            self._decoding = []
            self._prefilling = []
            self._waiting.clear()
        for sequence in sequences:
            if sequence.result.set_running_or_notify_cancel():
                sequence.result.set_exception(error)

    def _set_steps(self, sequence: RunningSequence) -> None:
        """Compute the step of each prompt token."""
        if self._markers is None:
            sequence.steps = []
        elif not sequence.request.adapted:
            sequence.steps = [NO_STEP] * len(sequence.prompt)
        else:
            sequence.steps = step_ids(torch.tensor([list(sequence.prompt)]), self._markers)[0].tolist()
        sequence.step = sequence.steps[-1] if sequence.steps else QUESTION

    def _following(self, sequence: RunningSequence, result: Any) -> Request | None:
        """The request that continues in a finished sequence's slot; without one, the sequence's result is set."""
        following = sequence.request.follow(result) if sequence.request.follow is not None else result
        if isinstance(following, Request):
            return following
        if sequence.result.set_running_or_notify_cancel():  # False: it was cancelled meanwhile
            sequence.result.set_result(following)
        return None

    def _take(self, sequences: list[RunningSequence], logits_B_V: Tensor) -> list[tuple[RunningSequence, Any]]:
        """Choose the next token of each sequence; returns those that have ended, with their results."""
        ended: list[tuple[RunningSequence, Any]] = []
        for sequence, logits_V in zip(sequences, logits_B_V, strict=True):
            request = sequence.request
            if request.words is not None:
                ended.append((sequence, float(logits_V[list(request.words)].float().softmax(0)[0])))
            elif request.scored:
                ended.append((sequence, sequence.score / request.scored))
        indices = [i for i, s in enumerate(sequences) if s.request.words is None and not s.request.scored]
        if not indices:
            return ended
        sequences = [sequences[i] for i in indices]
        masked = torch.stack([s.masked(logits_B_V[i]) for i, s in zip(indices, sequences, strict=True)])
        tokens = draw(masked, [s.request.sampling for s in sequences], [len(s.generated) for s in sequences])
        for sequence, token in zip(sequences, tokens.tolist(), strict=True):
            request = sequence.request
            sequence.generated.append(token)
            if self._markers is not None and request.adapted:
                sequence.step = next_step(sequence.step, token, self._markers)
            if request.on_token is not None:
                request.on_token(token)
            if request.grammar.ended(sequence.generated) or len(sequence.generated) >= request.limit:
                ended.append((sequence, sequence.generated))
        return ended


@atexit.register
def _stop_threads() -> None:
    """The interpreter must not end under a thread that computes: the library would abort the process."""
    for loop in list(_LOOPS):
        loop._stopping = True  # after the forward pass that runs
        loop.wait()
