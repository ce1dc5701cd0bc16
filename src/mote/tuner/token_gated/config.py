"""`TokenGatedConfig`: token-gated experts as a PEFT method, with the markers that all methods train."""

from dataclasses import dataclass, field

from mote.tuner import MoteConfig
from mote.tuner.registration import peft_type

NAME = "TOKEN_GATED"


@dataclass
class TokenGatedConfig(MoteConfig):
    """Configuration of experts that a learned gate chooses per token; fields of `MoteConfig` mean the same.

    `experts`, the markers and the scheme describe the reasoning steps, which the gate does not see; `mix`,
    `question_expert` and `rank_pattern` have no effect.

    Args:
        gated_experts: Number of experts per layer.
        top_k: Number of experts per token.
        balance: Factor of the load-balance loss.
        contrast: Factor of the contrastive loss (MoELoRA, arXiv 2402.12851); 0 for none.
        temperature: Temperature of the contrastive loss.
        dispatch: `gather` runs each expert on the tokens routed to it, as the published code does. `dense` runs all
            experts on all tokens in one pair of matmuls and weights the results, with the same numbers.

    Raises:
        ValueError: A value is out of range.
    """

    gated_experts: int = field(default=4, metadata={"help": "experts of a layer"})
    top_k: int = field(default=2, metadata={"help": "number of experts per token"})
    balance: float = field(default=0.01, metadata={"help": "factor of the load-balance loss"})
    contrast: float = field(default=0.0, metadata={"help": "factor of the contrastive loss"})
    temperature: float = field(default=0.1, metadata={"help": "temperature of the contrastive loss"})
    dispatch: str = field(default="gather", metadata={"help": "gather or dense"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type(NAME)
        if not 1 <= self.top_k <= self.gated_experts:
            raise ValueError(f"top_k={self.top_k}: use 1 to {self.gated_experts}, the number of experts")
        if self.dispatch not in ("gather", "dense"):
            raise ValueError(f"dispatch={self.dispatch!r}: use 'gather' or 'dense'")
