"""Ask a model for text."""

from mote.engines.protocol import Completion, Engine, Preference, Prompt, Refused, Scorer

__all__ = ["Completion", "Engine", "Preference", "Prompt", "Refused", "Scorer"]
