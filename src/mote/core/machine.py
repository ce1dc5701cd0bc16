"""Versions and hardware for the run's record (no host name, no path), and the rank of this process."""

import os
import platform
import resource
import sys
from importlib import metadata
from pathlib import Path
from typing import Any


def peak_memory_mb() -> int:
    """Peak memory so far in MB: allocated on the GPUs if any is used, else resident memory of the process."""
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        allocated = sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
        if allocated:
            return int(allocated / 2**20)
    return int(resident_peak_mb())


def resident_peak_mb() -> float:
    """Peak resident memory of this process in MB.

    On Linux `ru_maxrss` starts at the parent's value at fork, hence `VmHWM`.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/mote`, by default `~/.cache/mote`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mote"


def gguf_folder() -> Path:
    """Folder of the GGUF files that the llama.cpp engine makes."""
    return cache_folder() / "gguf"


LLAMACPP = "xllamacpp"  # the wheel with llama.cpp
LLAMACPP_VERSION = "2026.10.11549"  # llama.cpp b11549, for whose structures `llama_library` is written
INTEL = "GenuineIntel"
_PACKAGES = ("mote-align", "torch", "transformers", "peft", "accelerate", "trl", "safetensors", "inspect-ai")


def is_first_process() -> bool:
    """Whether this process has rank 0: it writes the files and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def process_count() -> int:
    """World size: processes that a launcher (accelerate, torchrun) started for this command; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def environment() -> dict[str, Any]:
    """Versions of the packages that matter, processor, cores, memory, GPU, and the allocator's settings."""
    import psutil

    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    machine: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": os.cpu_count() or 1,
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
    }
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    allocator = {
        name: value for name, value in os.environ.items() if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"
    }
    if allocator:
        machine["malloc"] = allocator
    return {"versions": versions, "machine": machine}


def cpu_model() -> str:
    """The processor's name if the system reports it, else its architecture."""
    return _cpu("model name") or platform.processor() or platform.machine()


def cpu_vendor() -> str:
    """Vendor id of an x86 processor (`GenuineIntel`, `AuthenticAMD`); empty if unknown."""
    if sys.platform == "darwin" and platform.machine() == "x86_64":
        return INTEL
    # On Windows: "Intel64 Family 6 Model 142 Stepping 12, GenuineIntel".
    return _cpu("vendor_id") or platform.processor().rpartition(", ")[2]


def _cpu(name: str) -> str:
    """A field of the first processor in Linux's `/proc/cpuinfo`; empty if there is none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return ""
    with path.open(encoding="utf-8") as lines:  # long on many cores; the first entry is enough
        return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
