"""Benchmarks that belong to the package: speed and memory as ratios within one run."""
