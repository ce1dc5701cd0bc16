"""Ask a model for text."""

from mote.engines.protocol import Completion, Engine, Prompt

__all__ = ["Completion", "Engine", "Prompt"]
