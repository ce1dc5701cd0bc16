"""`environment.json` of a run folder: versions, machine, and each stage's settings, time and memory."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mote.core.errors import UserError
from mote.core.files import write_json
from mote.core.machine import environment, is_first_process, peak_memory_mb


@dataclass
class StageResult:
    """What the body of a stage reports."""

    note: str = ""


class StageLog:
    """The stages of one run folder; of several processes only the first writes and prints."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "environment.json"

    def settings(self, name: str) -> dict[str, Any] | None:
        """The settings a stage ran with; None if it never started."""
        stage = self._stages().get(name)
        return None if stage is None else stage["made_by"]

    def forget(self, name: str) -> None:
        """Remove a stage's entry."""
        stages = [stage for stage in self._stages().values() if stage["stage"] != name]
        write_json(self.path, self._content() | {"stages": stages})

    def reuse(self, name: str, settings: dict[str, Any], note: str) -> None:
        """Record that a stage's result is complete already.

        Raises:
            UserError: It was made with other settings.
        """
        entry = self._entry(name, settings)
        if is_first_process():
            print(f"{name}: reused, {note}", file=sys.stderr)
            self._write(entry | {"reused": True})

    @contextmanager
    def record(self, name: str, settings: dict[str, Any], output: Path) -> Iterator[StageResult]:
        """Run the body as a stage: record its settings before, its time and memory after, and print its note.

        Args:
            name: The stage.
            settings: What its result depends on; a stage without any is not recorded until it is done.
            output: If the body fails before this path exists, the record of the settings is undone.

        Raises:
            UserError: The folder holds the stage of other settings.
        """
        result = StageResult()
        entry = self._entry(name, settings)
        if not is_first_process():
            yield result
            return
        began = time.monotonic()
        before = self.path.read_bytes() if self.path.exists() else None
        self._write(entry if settings else None)
        try:
            yield result
        except BaseException:
            if not output.exists():
                self.path.unlink() if before is None else self.path.write_bytes(before)
            raise
        seconds = round(time.monotonic() - began, 1)
        print(f"{name}: {result.note} ({seconds:.1f} s)", file=sys.stderr)
        self._write(entry | {"seconds": seconds, "reused": False, "peak_memory_mb": peak_memory_mb()})

    def _entry(self, name: str, settings: dict[str, Any]) -> dict[str, Any]:
        new = {"stage": name, "seconds": 0.0, "reused": False, "peak_memory_mb": 0}
        entry = self._stages().get(name, new)
        if changed := changed_keys(entry.get("made_by", settings), settings):
            raise UserError(
                f"out: {self.folder} holds the {name} stage of other settings (they differ in {changed}); give another "
                "folder with --out, or remove that one"
            )
        return entry | {"made_by": settings}

    def _write(self, entry: dict[str, Any] | None) -> None:
        stages = self._stages()
        if entry is not None:
            stages[entry["stage"]] = entry
        write_json(self.path, self._content() | {"stages": list(stages.values())})

    def _stages(self) -> dict[str, dict[str, Any]]:
        return {stage["stage"]: stage for stage in self._content().get("stages", [])}

    def _content(self) -> dict[str, Any]:
        if not self.path.exists():
            return environment() | {"stages": []}
        content: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        return content


def changed_keys(old: Any, new: Any, prefix: str = "") -> str:
    """Dotted names of the values in which two trees of settings differ, joined by commas."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        parts = [changed_keys(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key) for key in keys]
        return ", ".join(part for part in parts if part)
    return "" if old == new else prefix
