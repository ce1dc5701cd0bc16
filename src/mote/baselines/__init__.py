"""Rivals of the step experts, for ablations and benchmarks only."""
