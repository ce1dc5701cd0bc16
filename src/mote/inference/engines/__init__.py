"""Engines write chains: in this process, at a server, in vLLM."""
