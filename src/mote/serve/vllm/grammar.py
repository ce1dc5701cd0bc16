"""The step grammar as a logits processor of vLLM: each request keeps to the chains of its mode.

Rows and requests move within vLLM's batch; what is known of an answer goes with its row. An answer of the base model
has no grammar, and may hold no marker. Shapes: N request, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from mote.inference.grammar import NOTHING, ChainGrammar
from mote.serve.vllm.folder_config import OWN_GRAMMAR, Served
from mote.serve.vllm.requirements import StepSettings

NEVER = float("-inf")


class Row:
    """One request: its grammar, the list of its ids that vLLM goes on filling, and how far that was read."""

    def __init__(self, grammar: ChainGrammar, ids: Sequence[int]) -> None:
        self.grammar, self.ids = grammar, ids
        self.written, self.read = NOTHING, 0

    def allowed(self) -> tuple[list[int], bool]:
        """What may come next; only tokens that came since the last call are looked at."""
        self.written = self.grammar.read(self.written, self.ids[self.read :])
        self.read = len(self.ids)
        return self.grammar.behind(self.written)


class StepGrammarProcessor(LogitsProcessor):
    """Sets to minus infinity what the grammar of a row forbids."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request that cannot be served, before it runs.

        Raises:
            ValueError: Its mode, a budget or another of its settings cannot be served.
        """
        assert StepSettings.served is not None
        StepSettings.served.check(sampling_params.extra_args or {}, sampling_params.max_tokens)
        for name in ("structured_outputs", "allowed_token_ids", "logit_bias", "bad_words", "min_tokens"):
            if getattr(sampling_params, name):
                raise ValueError(OWN_GRAMMAR.format(name))

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.served = Served.model_validate(vllm_config.model_config.hf_config.mote)
        self.special = torch.tensor(
            sorted({*self.served.special, *self.served.reserved, self.served.eos}), device=device
        )
        self.reserved = torch.tensor(sorted(self.served.reserved), dtype=torch.long, device=device)
        self.rows: dict[int, Row | None] = {}  # by index in the batch; None for the base model

    def is_argmax_invariant(self) -> bool:
        """Greedy decoding needs it too."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests that came, went or moved."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self.rows.pop(index, None)
        for index, params, prompt, written in batch_update.added:
            of_base = bool(prompt) and prompt[0] == self.served.opening[1]
            grammar = self.served.grammar(params.extra_args or {}, params.max_tokens)
            self.rows[index] = None if of_base else Row(grammar, written)
        for source, target, direction in batch_update.moved:
            moved, there = self.rows.pop(source, None), self.rows.pop(target, None)
            self.rows[target] = moved
            if direction == MoveDirectionality.SWAP:
                self.rows[source] = there

    def apply(self, logits: Tensor) -> Tensor:
        """Logits (N, V), changed in place."""
        free: list[int] = []
        only: list[int] = []
        rows: list[int] = []
        ids: list[int] = []
        for index, row in self.rows.items():
            if row is None:
                continue
            allowed, closed = row.allowed()
            (only if closed else free).append(index)
            rows += [index] * len(allowed)
            ids += allowed
        places = torch.tensor(rows, dtype=torch.long), torch.tensor(ids, dtype=torch.long)
        kept = logits[places]
        logits.index_fill_(1, self.reserved, NEVER)
        logits[torch.tensor(free, dtype=torch.long)[:, None], self.special] = NEVER
        for index in only:
            logits[index] = NEVER  # a row is filled twice as fast as through an index of rows
        logits[places] = kept
        return logits
