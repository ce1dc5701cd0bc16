"""Chains -> a trained adapter, on transformers' `Trainer`."""

from mote.train.arguments import check_base, training_arguments
from mote.train.log import last_whole_checkpoint
from mote.train.stage import check_settings, mote_config, train
from mote.train.trainer import MoteTrainer

__all__ = [
    "MoteTrainer",
    "check_base",
    "check_settings",
    "last_whole_checkpoint",
    "mote_config",
    "train",
    "training_arguments",
]
