"""Prompts to text: continuous batching, grammar, self-check; adapters are opened here."""
