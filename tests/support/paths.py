"""The repository, and upstream data sets beside it."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
UPSTREAM = Path(os.environ.get("MOTE_UPSTREAM_DATA", ROOT.parent / "shared" / "data"))
