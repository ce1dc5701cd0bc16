"""What may be written next, on logits: the steps of a mode between their markers, or any text."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from mote.chain_grammar import ChainGrammar
from mote.tokens.routing import Markers

_NEVER = float("-inf")


class FreeText:
    """Any text up to the end of the turn.

    Args:
        eos_id: The end of the turn.
        forbidden: Tokens that must not come: with the adapter off, the untrained rows of the markers.
    """

    def __init__(self, eos_id: int, forbidden: Sequence[int] = ()) -> None:
        self.eos_id, self.forbidden = eos_id, torch.tensor(forbidden, dtype=torch.long)

    def mask(self, logits_V: Tensor, written: Sequence[int]) -> Tensor:
        """The logits with the forbidden tokens at minus infinity."""
        if not len(self.forbidden):
            return logits_V
        return logits_V.index_fill(0, self.forbidden.to(logits_V.device), _NEVER)

    def ended(self, written: Sequence[int]) -> bool:
        """Whether the turn has ended."""
        return written[-1] == self.eos_id


class StepGrammar(ChainGrammar, LogitsProcessor):
    """Lets a row write only chains of its mode, as `ChainGrammar` has it.

    Args:
        chains: The chains of the mode, as indices of the steps; all end with the answer.
        markers: The steps' marker ids.
        special_ids: Special tokens of the tokenizer, which no step may hold.
        eos_id: The end of the turn.
        prompt_length: Tokens of the padded prompt, where it is called as a logits processor.
        max_step_tokens: Budget of a step.
        max_tokens: Budget in all, markers included; None for none.
    """

    def __init__(
        self,
        chains: Sequence[tuple[int, ...]],
        markers: Markers,
        special_ids: Collection[int],
        eos_id: int,
        prompt_length: int,
        max_step_tokens: int,
        max_tokens: int | None = None,
    ) -> None:
        super().__init__(chains, markers, eos_id, max_step_tokens, max_tokens)
        self.prompt_length = prompt_length
        self.special_ids = torch.tensor(sorted({*special_ids, *markers.starts, *markers.ends, eos_id}))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) with what the grammar forbids at minus infinity: for transformers' `generate`."""
        written = input_ids[:, self.prompt_length :].tolist()
        return torch.stack([self.mask(row, ids) for row, ids in zip(scores, written, strict=True)])

    def mask(self, logits_V: Tensor, written: Sequence[int]) -> Tensor:
        """The logits with what the grammar forbids behind these ids at minus infinity."""
        ids, only = self.allowed(written)
        if only:
            masked = torch.full_like(logits_V, _NEVER)
        else:
            masked = logits_V.index_fill(0, self.special_ids.to(logits_V.device), _NEVER)
        masked[ids] = logits_V[ids]
        return masked


class OpenStep(StepGrammar):
    """One step, which the prompt has opened with its start marker."""

    @property
    def start(self) -> int:
        """The marker that the prompt ends with."""
        return self.markers.starts[self.chains[0][0]]

    def allowed(self, ids: Sequence[int]) -> tuple[list[int], bool]:
        """As for a whole chain, behind the start marker."""
        return super().allowed([self.start, *ids])
