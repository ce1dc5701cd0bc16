"""Lets one thread have all cores after another has computed on them.

GNU's OpenMP, which PyTorch computes with on Linux, keeps a pool of threads for each thread that has computed. Where
all pools together are larger than the machine, its threads sleep as soon as they have nothing to do, and waking them
takes longer than most products of a written token: on two cores a token took 91 ms, 42 without the other pool
(docs/decisions/0034).
"""

import ctypes
import functools
import sys
from typing import Any

_SOFT = 1  # omp_pause_soft: the next product makes the pool anew


def release_pool() -> None:
    """Give up the calling thread's pool, since another thread is about to compute; nothing where there is none."""
    if (pause := _pause()) is not None:
        pause(_SOFT)


@functools.cache
def _pause() -> Any:
    """OpenMP 5's `omp_pause_resource_all` of the library that PyTorch has loaded; None where it has another one."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
