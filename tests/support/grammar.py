"""The step grammar for transformers' `generate`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from mote.inference.grammar import StepGrammar


class GrammarProcessor(LogitsProcessor):
    """Masks the scores of each row with a grammar.

    Args:
        grammar: Arguments of `StepGrammar`.
        prompt_length: Tokens of the padded prompt.
    """

    def __init__(self, *grammar: Any, prompt_length: int = 0, **options: Any) -> None:
        self.grammar = StepGrammar(*grammar, **options)
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) with what the grammar forbids at minus infinity."""
        generated: Sequence[list[int]] = input_ids[:, self.prompt_length :].tolist()
        return torch.stack([self.grammar.mask(row, ids) for row, ids in zip(scores, generated, strict=True)])
