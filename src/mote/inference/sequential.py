"""Sequential generation by transformers' `generate`, for models that continuous batching does not support.

State-space, convolution and linear-attention layers keep a state, which our KV slots cannot store and transformers' own
cache can. Exact for every model that `generate` runs, and slower than `mote.inference.batching`.
Shapes: T token, V vocabulary.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from typing_extensions import override

from mote.inference.batch_loop import BatchLoop
from mote.inference.sequence import RunningSequence, draw
from mote.inference.threads import release_pool
from mote.models.kv_cache import forward_arguments
from mote.tokens.routing import Markers


class SequentialLoop(BatchLoop):
    """Computes one request at a time; each prefills its whole prompt, those that `Request.follow` returns too.

    Args:
        model: A causal language model, with or without an adapter.
        markers: Markers of an adapter with step experts, None without one.
    """

    def __init__(self, model: Any, markers: Markers | None = None) -> None:
        super().__init__(1, markers)
        self._model = model
        release_pool()  # the caller's thread loaded the model

    @override
    def _admit(self) -> None:
        with self._lock:
            if not self._decoding and self._waiting:
                self._decoding = [self._waiting.popleft()]

    @override
    def _step(self) -> None:
        """Compute a whole request."""
        [sequence] = self._decoding
        if not sequence.result.cancelled():
            result = self._compute(sequence)
            if not sequence.result.cancelled() and (following := self._following(sequence, result)) is not None:
                sequence.request = following
                sequence.generated = []
                return
        self._decoding = []

    def _compute(self, sequence: RunningSequence) -> Any:
        """The result of one request: generated ids, a probability or a mean log-probability."""
        request = sequence.request
        row = torch.tensor([list(request.ids)], device=self._model.device)
        self.tokens_computed += row.shape[1]
        with self._adapter(request.adapted):
            if request.words is not None:
                logits_V = self._logits(row, 1)[-1]
                return float(logits_V[list(request.words)].float().softmax(0)[0])
            if request.scored:
                logits_T_V = self._logits(row, request.scored + 1)[:-1]
                found = logits_T_V.float().log_softmax(-1).gather(1, row[0, -request.scored :, None])
                return float(found.mean())
            self._generate(sequence, row)
        return sequence.generated

    def _adapter(self, on: bool) -> AbstractContextManager[Any]:
        if on or self._markers is None:
            return nullcontext()
        off: AbstractContextManager[Any] = self._model.disable_adapter()
        return off

    def _logits(self, row: Tensor, last: int) -> Tensor:
        """Logits (last, V) of the last tokens of a row (1, T)."""
        kept = {"logits_to_keep": last} if "logits_to_keep" in forward_arguments(self._model) else {}
        logits: Tensor = self._model(input_ids=row, use_cache=False, **kept).logits
        return logits[0, -last:]

    def _generate(self, sequence: RunningSequence, row: Tensor) -> None:
        """Generate the sequence's tokens; `_Chosen` leaves `generate` one possible token at a time."""
        self._model.generate(
            input_ids=row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=max(sequence.request.limit, 1),
            do_sample=False,
            num_beams=1,
            eos_token_id=None,  # the grammar decides
            logits_processor=LogitsProcessorList([_Chosen(sequence)]),
            stopping_criteria=StoppingCriteriaList([_Ended(self, sequence)]),
        )
        self.tokens_computed += len(sequence.generated) - 1


class _Chosen(LogitsProcessor):
    """Chooses the next token as the running batch does: by the request's grammar and sampling."""

    def __init__(self, sequence: RunningSequence) -> None:
        self._sequence = sequence

    @override
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        sequence = self._sequence
        request = sequence.request
        masked = sequence.masked(scores[0])
        token = int(draw(masked[None], [request.sampling], [len(sequence.generated)])[0])
        sequence.generated.append(token)
        if request.on_token is not None:
            request.on_token(token)
        return torch.full_like(scores, float("-inf")).index_fill_(1, torch.tensor([token], device=scores.device), 0.0)


class _Ended(StoppingCriteria):
    """Whether the grammar has ended the text, the request was cancelled, or the process ends."""

    def __init__(self, loop: BatchLoop, sequence: RunningSequence) -> None:
        self._loop = loop
        self._sequence = sequence

    @override
    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        sequence = self._sequence
        ended = sequence.request.grammar.ended(sequence.generated)
        ended = ended or sequence.result.cancelled() or self._loop._stopping
        return torch.tensor([ended], device=input_ids.device)
