"""Token-gated experts: a baseline of the step experts, for ablations and benchmarks only."""

from mote.tuner.registration import register
from mote.tuner.token_gated.config import NAME, TokenGatedConfig
from mote.tuner.token_gated.layer import gate_loss, gated_layers
from mote.tuner.token_gated.model import TokenGatedModel

register(NAME, TokenGatedConfig, TokenGatedModel)

__all__ = ["TokenGatedConfig", "TokenGatedModel", "gate_loss", "gated_layers"]
