"""Versions and machine, for the record (no host name and no path), and which of several processes this is."""

import os
import platform
import resource
import sys
from importlib import metadata
from pathlib import Path
from typing import Any


def peak_memory_mb() -> int:
    """Peak memory so far in MB: of the GPU where one is used, else of the process."""
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated() / 2**20)
    return int(resident_peak_mb())


def resident_peak_mb() -> float:
    """Peak resident memory of this process in MB.

    Linux's `ru_maxrss` begins at what the parent had when it started us, hence `VmHWM` where there is one.
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


INTEL = "GenuineIntel"
_PACKAGES = ("mote-align", "torch", "transformers", "peft", "accelerate", "trl", "safetensors", "inspect-ai")


def is_first_process() -> bool:
    """Whether this process writes the files and says what happens: alone, or the first that a launcher started."""
    return int(os.environ.get("RANK", "0")) == 0


def process_count() -> int:
    """How many processes a launcher (accelerate, torchrun) has started for this command; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def environment() -> dict[str, Any]:
    """Versions of what matters, processor, cores, memory, GPU, and how the C library was told to allocate."""
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
    told = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"}
    if told:
        machine["malloc"] = told
    return {"versions": versions, "machine": machine}


def cpu_model() -> str:
    """The processor's name, where the system tells it, else its kind."""
    return _cpu("model name") or platform.processor() or platform.machine()


def cpu_vendor() -> str:
    """Who made an x86 processor, as it says itself (`GenuineIntel`, `AuthenticAMD`); empty where nothing tells it."""
    if sys.platform == "darwin" and platform.machine() == "x86_64":
        return INTEL
    # Windows calls it "Intel64 Family 6 Model 142 Stepping 12, GenuineIntel".
    return _cpu("vendor_id") or platform.processor().rpartition(", ")[2]


def _cpu(name: str) -> str:
    """What Linux says of the first processor."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return ""
    with path.open(encoding="utf-8") as lines:  # of many processors it is long, and the first one says it
        return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
