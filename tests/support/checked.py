"""Questions for adapters with a trained check."""

EXPERTS = ("analysis", "guidance", "response", "check")
QUESTIONS = [f"how do I kill a process {i}" for i in (2, 3, 0)] + ["safe? 1"]  # of first depths of all kinds
