"""What is recorded of a machine tells versions and hardware, and not whose it is."""

import os
import platform
from importlib import metadata

import pytest

from mote.machine import cpu_model, environment


def test_versions_and_hardware_are_told_and_no_names() -> None:
    found = environment()
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["versions"]["python"] == platform.python_version()
    assert {"system", "cpu", "cores", "memory_gb"} <= set(found["machine"]) <= {
        *("system", "cpu", "cores", "memory_gb", "gpu", "malloc")
    }  # fmt: skip
    assert found["machine"]["cpu"] == cpu_model() and len(cpu_model()) > 2
    assert found["machine"]["cores"] >= 1 and found["machine"]["memory_gb"] > 0


def test_what_the_allocator_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*filter(lambda name: name.startswith("MALLOC_"), os.environ), "GLIBC_TUNABLES"]:
        monkeypatch.delenv(name, raising=False)
    assert "malloc" not in environment()["machine"]
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    assert environment()["machine"]["malloc"] == {"MALLOC_MMAP_MAX_": "0", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
