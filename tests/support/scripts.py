"""Scripts of `benchmarks/` as modules."""

import importlib.util
import sys
from types import ModuleType

from support.paths import ROOT


def benchmark(name: str) -> ModuleType:
    """A script, without running it."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its named tuples look themselves up
    spec.loader.exec_module(module)
    return module
