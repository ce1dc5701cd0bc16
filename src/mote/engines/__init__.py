"""Ask a model for text."""

from mote.engines.protocol import Completion, Engine, Likelihood, Preference, Prompt, Refused, Scorer

__all__ = ["Completion", "Engine", "Likelihood", "Preference", "Prompt", "Refused", "Scorer"]
