"""Registers step experts when PEFT is imported, so that `import mote` alone makes adapters loadable.

Importing PEFT brings torch and takes seconds, which `mote --help` and making chains through a server do not need.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class _AfterPeft(MetaPathFinder):
    """Finds `peft` as usual and, once it has run, imports our tuner."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "peft":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        run: Any = loader.exec_module

        def run_then_register(module: ModuleType) -> None:
            sys.meta_path.remove(self)
            run(module)
            import_module("mote.tuner")

        assert isinstance(loader, Loader)
        loader.exec_module = run_then_register  # type: ignore[method-assign]
        return spec


def register_with_peft() -> None:
    """Register now if PEFT is there already, else as soon as it is imported."""
    if "peft" in sys.modules:
        import_module("mote.tuner")
    else:
        sys.meta_path.insert(0, _AfterPeft())
