"""Evaluation on Inspect (decision 23): model providers, tasks, jailbreak techniques, scorers, statistics and suites."""
