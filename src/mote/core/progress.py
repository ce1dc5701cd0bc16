"""Progress of long work on stderr, with rate and time left: a bar on a terminal, else plain lines."""

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm


class Progress:
    """Progress of one stage.

    Args:
        stage: Name of the stage.
        unit: Plural noun of the items that are counted.
    """

    def __init__(self, stage: str, unit: str) -> None:
        self.stage = stage
        self.unit = unit
        self.started = time.monotonic()
        self.first: int | None = None  # items that were done before
        self.bar: Any = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, done: int, total: int) -> None:
        """Report that `done` of `total` items are done; the first call gives the items of an earlier run."""
        if self.first is None:
            self.first = done
        if sys.stderr.isatty():
            if self.bar is None:
                self.bar = tqdm(total=total, initial=done, desc=self.stage, unit=f" {self.unit}")
            self.bar.update(done - self.bar.n)
            return
        new = done - self.first
        seconds = time.monotonic() - self.started
        speed = f", {new / seconds * 60:.1f}/min, {seconds / new * (total - done):.0f} s left" if new else ""
        print(f"{self.stage}: {done}/{total} {self.unit}{speed}", file=sys.stderr)
