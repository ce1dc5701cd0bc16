"""Appends what the trainer logs to `metrics.jsonl`, and prints plain progress lines where there is no terminal."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from mote.core.files import write_atomic
from mote.core.machine import peak_memory_mb
from mote.train.trainer import MoteTrainer

COMPLETE = "complete"  # the last file of a checkpoint; without it the checkpoint is torn


class Metrics(TrainerCallback):
    """Writes from the first process alone."""

    def __init__(self, path: Path, first_row: dict[str, Any]) -> None:
        """Callback of one training.

        Args:
            path: `metrics.jsonl`.
            first_row: What is trained, the file's first line.
        """
        self.path, self.first_row = path, first_row
        self.trainer: MoteTrainer | None = None
        self.clock = (0.0, 0)
        self.began, self.first_step = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Drop the lines behind the checkpoint that training goes on from."""
        self.began, self.first_step = time.monotonic(), state.global_step
        self.clock = (self.began, 0)
        if not state.is_world_process_zero:
            return
        rows = [{"step": 0, "epoch": 0.0, **self.first_row}]
        if state.global_step and self.path.exists():
            there = [json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")]
            rows = [row for row in there if row["step"] <= state.global_step]
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Write one row; training rows also hold the speed and the memory."""
        if "train_runtime" in logs or self.trainer is None:
            return
        row = {"step": state.global_step, "epoch": round(state.epoch or 0, 4)}
        row |= {key: value for key, value in logs.items() if key != "epoch"}
        if "loss" in logs:
            now, seen = time.monotonic(), self.trainer.tokens_of_all()
            tokens, seconds = seen - self.clock[1], now - self.clock[0]
            row |= {"tokens": tokens, "seconds": round(seconds, 3)}
            row["tokens_per_second"] = round(tokens / max(seconds, 1e-9), 1)
            row["peak_memory_mb"] = peak_memory_mb()
            self.clock = (now, seen)
        if not state.is_world_process_zero:
            return
        with open(self.path, "a") as sink:
            sink.write(json.dumps(row) + "\n")
        if not sys.stderr.isatty() and "loss" in logs:
            each = (time.monotonic() - self.began) / (state.global_step - self.first_step)
            print(
                f"train: step {state.global_step}/{state.max_steps} loss {logs['loss']:.3f}, "
                f"{row['tokens_per_second']:.0f} tokens/s, {each * (state.max_steps - state.global_step):.0f} s left",
                file=sys.stderr,
            )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark the checkpoint as whole, once every process has written its part."""
        if self.trainer is not None:
            self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; a torn one is passed over."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def held_out_losses(path: Path, best: int | None) -> dict[str, float]:
    """The held-out losses of the weights that are kept, by their names; empty where nothing was held out.

    Args:
        path: `metrics.jsonl`.
        best: Updates that made the best weights, where those are kept and not the last ones.
    """
    rows = [row for row in map(json.loads, path.read_text().splitlines()) if "eval_loss" in row]
    rows = [row for row in rows if not best or row["step"] == best]
    return {key: value for key, value in rows[-1].items() if key.startswith("eval_loss")} if rows else {}
