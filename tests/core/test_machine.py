"""The record of a machine has versions and hardware and no names."""

import os
import platform
import sys
from importlib import metadata

import pytest
import torch

from mote.core import machine
from mote.core.machine import INTEL, cpu_model, cpu_vendor, environment, peak_memory_mb


def test_versions_and_hardware_are_recorded_without_names() -> None:
    found = environment()
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["versions"]["python"] == platform.python_version()
    assert {"system", "cpu", "cores", "memory_gb"} <= set(found["machine"]) <= {
        *("system", "cpu", "cores", "memory_gb", "gpu", "malloc")
    }  # fmt: skip
    assert found["machine"]["cpu"] == cpu_model() and len(cpu_model()) > 2
    assert found["machine"]["cores"] >= 1 and found["machine"]["memory_gb"] > 0


def test_allocator_settings_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*filter(lambda name: name.startswith("MALLOC_"), os.environ), "GLIBC_TUNABLES"]:
        monkeypatch.delenv(name, raising=False)
    assert "malloc" not in environment()["machine"]
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    assert environment()["machine"]["malloc"] == {"MALLOC_MMAP_MAX_": "0", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def test_the_processor_vendor(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu_vendor() in (INTEL, "AuthenticAMD") or platform.machine() not in ("x86_64", "AMD64")
    for system, processor, vendor, wanted in (
        ("linux", "x86_64", "AuthenticAMD", "AuthenticAMD"),
        ("win32", "Intel64 Family 6 Model 142 Stepping 12, GenuineIntel", "", INTEL),
        ("darwin", "i386", "", INTEL),
    ):
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(platform, "machine", lambda: "x86_64")
        monkeypatch.setattr(platform, "processor", lambda processor=processor: processor)
        monkeypatch.setattr(machine, "_cpu", lambda _, vendor=vendor: vendor)
        assert cpu_vendor() == wanted


def test_peak_memory_is_that_of_the_gpus_if_one_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = {0: 0, 1: 3 * 2**20}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", allocated.__getitem__)
    assert peak_memory_mb() == 3
    allocated[1] = 0  # a run on the CPU of such a machine
    assert peak_memory_mb() == int(machine.resident_peak_mb()) > 10
