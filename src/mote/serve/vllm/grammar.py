"""The step grammar as a vLLM logits processor: constrains each request to the chains of its mode.

vLLM adds, removes and moves requests within its batch; the grammar's state moves with its request. Base-model requests
have no grammar and may generate no marker. Shapes: B request, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from mote.inference.grammar import START, ChainGrammar
from mote.serve.vllm.engine_config import StepEngineConfig
from mote.serve.vllm.folder_config import GRAMMAR_CONFLICT, ServedConfig

NEVER = float("-inf")


class RequestState:
    """The grammar's state of one request; vLLM keeps appending generated ids to `ids`."""

    def __init__(self, grammar: ChainGrammar, ids: Sequence[int]) -> None:
        self.grammar = grammar
        self.ids = ids
        self.state = START
        self.read = 0

    def allowed(self) -> tuple[list[int], bool]:
        """Allowed special ids and whether they are forced; only reads ids added since the last call."""
        self.state = self.grammar.advance(self.state, self.ids[self.read :])
        self.read = len(self.ids)
        return self.grammar.next_ids(self.state)


class StepGrammarProcessor(LogitsProcessor):
    """Masks the logits of tokens that a request's grammar forbids."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request that cannot be served, before it is scheduled.

        Raises:
            ValueError: Its mode, a budget or another setting is not supported.
        """
        assert StepEngineConfig.served is not None
        StepEngineConfig.served.check(sampling_params.extra_args or {})
        for name in ("structured_outputs", "allowed_token_ids", "logit_bias", "bad_words", "min_tokens"):
            if getattr(sampling_params, name):
                raise ValueError(GRAMMAR_CONFLICT.format(name))

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.served = ServedConfig.model_validate(vllm_config.model_config.hf_config.mote)
        self.special = torch.tensor(
            sorted({*self.served.special, *self.served.reserved, self.served.eos}), device=device
        )
        self.reserved = torch.tensor(sorted(self.served.reserved), dtype=torch.long, device=device)
        self.requests: dict[int, RequestState | None] = {}  # by batch index; None for base-model requests

    def is_argmax_invariant(self) -> bool:
        """The grammar changes greedy decoding too."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests that were added, removed or moved."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self.requests.pop(index, None)
        for index, params, prompt, generated in batch_update.added:
            base_model = bool(prompt) and prompt[0] == self.served.opening[1]
            grammar = self.served.grammar(params.extra_args or {}, params.max_tokens)
            self.requests[index] = None if base_model else RequestState(grammar, generated)
        for source, target, direction in batch_update.moved:
            moved = self.requests.pop(source, None)
            replaced = self.requests.pop(target, None)
            self.requests[target] = moved
            if direction == MoveDirectionality.SWAP:
                self.requests[source] = replaced

    def apply(self, logits: Tensor) -> Tensor:
        """Logits (B, V), changed in place."""
        free: list[int] = []  # requests inside a step
        forced: list[int] = []  # requests for which ordinary tokens are masked out
        indices: list[int] = []
        ids: list[int] = []
        for index, request in self.requests.items():
            if request is None:
                continue
            allowed, is_forced = request.allowed()
            (forced if is_forced else free).append(index)
            indices += [index] * len(allowed)
            ids += allowed
        kept_at = torch.tensor(indices, dtype=torch.long), torch.tensor(ids, dtype=torch.long)
        kept = logits[kept_at]
        logits.index_fill_(1, self.reserved, NEVER)
        logits[torch.tensor(free, dtype=torch.long)[:, None], self.special] = NEVER
        for index in forced:
            logits[index] = NEVER  # twice as fast as indexing all rows at once
        logits[kept_at] = kept
        return logits
