"""Where models that were fetched and converted are kept."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/mote`, by default `~/.cache/mote`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mote"
