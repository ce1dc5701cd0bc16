"""The machine's speed, measured in half a second: matmul throughput, memory bandwidth, memory size."""

import time
from collections.abc import Callable
from functools import partial

from mote.core.records import Frozen
from mote.models.memory_estimate import device_memory


class Machine(Frozen):
    """A device's measured speed.

    Attributes:
        device: As torch names it.
        dtype: Of the measured matmuls.
        flops: Matmul throughput in FLOP/s.
        bandwidth: Bytes per second of a memory copy, read and written bytes both counted.
        memory: The device's memory in bytes.
    """

    device: str
    dtype: str
    flops: float
    bandwidth: float
    memory: int


def measure(device: str, dtype: str, seconds: float = 0.5) -> Machine:
    """Time matmuls and copies of a large block, half the time each.

    Args:
        device: As torch names it.
        dtype: Of the weights, as torch names it: a CPU with AMX multiplies bfloat16 several times as fast as float32.
        seconds: Time to spend.
    """
    import torch

    on_gpu = device.startswith("cuda")
    size = 8192 if on_gpu else 1024
    # Random numbers: a GPU multiplies ones faster.
    left = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    out = torch.empty_like(left)
    source = torch.ones((1024 if on_gpu else 64) * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    wait: Callable[[], object] = partial(torch.cuda.synchronize, device) if on_gpu else lambda: None
    matmuls = _rate(lambda: torch.mm(left, left, out=out), wait, seconds / 2)
    copies = _rate(lambda: target.copy_(source), wait, seconds / 2)
    return Machine(
        device=device,
        dtype=dtype,
        flops=2 * size**3 * matmuls,
        bandwidth=2 * source.numel() * copies,  # a copy of B bytes moves 2 B
        memory=device_memory(device),
    )


def _rate(work: Callable[[], object], wait: Callable[[], object], seconds: float) -> float:
    """Calls per second, after one warm-up call."""
    work()
    wait()
    began = time.perf_counter()
    done = 0
    while not done or time.perf_counter() - began < seconds:
        work()
        wait()
        done += 1
    return done / (time.perf_counter() - began)
