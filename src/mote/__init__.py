"""Safety self-alignment of open language models: reasoning chains and step experts (MoTE, ACL 2025)."""

import logging
import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mote.tuner import MoteConfig as MoteConfig

# PEFT imports bitsandbytes if it is installed, which on some CPUs warns that an optional kernel package is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Loaded on first use, so that making chains through a server needs no torch.
_LAZY = {
    "MoteConfig": "mote.tuner",
    "load": "mote.inference.load",
    "add_markers": "mote.tokens.encode",
    "speed_up": "mote.models.linear",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("mote-align")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'mote' has no attribute '{name}'")


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


# PEFT is not imported here: it takes seconds, which `mote --help` and making chains through a server do not need.
register_with_peft()
