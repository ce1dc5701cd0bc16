"""Progress of long work: a bar on a terminal, plain lines elsewhere; both with rate and time left, on stderr."""

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm


class Progress:
    """Shows how far a stage is.

    Args:
        stage: Name of the stage.
        unit: What is counted, in the plural.
    """

    def __init__(self, stage: str, unit: str) -> None:
        self.stage, self.unit = stage, unit
        self.began = time.monotonic()
        self.first: int | None = None
        self.bar: Any = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, done: int, total: int) -> None:
        """Say that `done` of `total` are there; the first call tells how many were there before."""
        if self.first is None:
            self.first = done
        if sys.stderr.isatty():
            if self.bar is None:
                self.bar = tqdm(total=total, initial=done, desc=self.stage, unit=f" {self.unit}")
            self.bar.update(done - self.bar.n)
            return
        made, seconds = done - self.first, time.monotonic() - self.began
        rest = f", {made / seconds * 60:.1f}/min, {seconds / made * (total - done):.0f} s left" if made else ""
        print(f"{self.stage}: {done}/{total} {self.unit}{rest}", file=sys.stderr)
