"""What is recorded of a machine tells versions and hardware, and not whose it is."""

import platform
from importlib import metadata

from mote.machine import cpu_model, environment


def test_versions_and_hardware_are_told_and_no_names() -> None:
    found = environment()
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["versions"]["python"] == platform.python_version()
    assert {"system", "cpu", "cores", "memory_gb"} <= set(found["machine"]) <= {
        *("system", "cpu", "cores", "memory_gb", "gpu")
    }  # fmt: skip
    assert found["machine"]["cpu"] == cpu_model() and len(cpu_model()) > 2
    assert found["machine"]["cores"] >= 1 and found["machine"]["memory_gb"] > 0
