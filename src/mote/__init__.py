"""Safety self-alignment of open language models: reasoning chains and step experts (MoTE, ACL 2025)."""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from mote.on_peft import register_with_peft

if TYPE_CHECKING:
    from mote.tuner import MoteConfig as MoteConfig

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


register_with_peft()
