"""Peak memory of this process."""

import resource
import sys


def peak_memory_mb() -> int:
    """Peak memory so far in MB: of the GPU where one is used, else of the process."""
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated() / 2**20)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak / (2**20 if sys.platform == "darwin" else 2**10))
