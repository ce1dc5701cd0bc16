"""Whole runs: `mote run`, its plan, ablations and benchmarks."""
