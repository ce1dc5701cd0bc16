"""Engines write text: in this process, at a server, in vLLM."""
