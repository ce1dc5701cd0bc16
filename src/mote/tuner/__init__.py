"""Step experts as a PEFT method."""

from mote.tuner.config import MoteConfig
from mote.tuner.model import MoteModel
from mote.tuner.registration import register

register(MoteConfig, MoteModel)

__all__ = ["MoteConfig", "MoteModel"]
