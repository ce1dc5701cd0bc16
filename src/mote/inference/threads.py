"""Release this thread's OpenMP pool so that the next thread's pool does not oversubscribe the cores.

GNU's OpenMP, which PyTorch uses on Linux, keeps a pool of threads for every thread that has computed. If all pools
together exceed the cores, idle threads sleep at once, and waking them takes longer than most matmuls of a token:
on two cores a decoded token took 91 ms, 42 ms without the other pool (docs/decisions/0034).
"""

import ctypes
import functools
import sys
from typing import Any

_SOFT = 1  # omp_pause_soft: the next matmul creates the pool again


def release_pool() -> None:
    """Release the calling thread's pool because another thread is about to compute; does nothing without GNU OpenMP."""
    if (pause := _pause()) is not None:
        pause(_SOFT)


@functools.cache
def _pause() -> Any:
    """OpenMP 5's `omp_pause_resource_all` of the library PyTorch has loaded, or None."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
