"""Appends what the trainer logs to `metrics.jsonl`; prints plain progress lines if stderr is not a terminal."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from typing_extensions import override

from mote.core.files import write_atomic
from mote.core.machine import peak_memory_mb
from mote.train.trainer import MoteTrainer

COMPLETE = "complete"  # written last; a checkpoint without it is incomplete


class Metrics(TrainerCallback):
    """Logs one training; only the first process writes."""

    def __init__(self, trainer: MoteTrainer, path: Path, first_row: dict[str, Any]) -> None:
        """Callback of one training.

        Args:
            trainer: Counts the tokens.
            path: `metrics.jsonl`.
            first_row: The file's first line: what is trained.
        """
        self.trainer = trainer
        self.path = path
        self.first_row = first_row
        self.began = 0.0
        self.first_step = 0
        self.last_logged = (0.0, 0)  # time and tokens seen

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # On resume, lines after the checkpoint are dropped.
        self.began = time.monotonic()
        self.first_step = state.global_step
        self.last_logged = (self.began, 0)
        if not state.is_world_process_zero:
            return
        rows = [{"step": 0, "epoch": 0.0, **self.first_row}]
        if state.global_step and self.path.exists():
            existing = [json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")]
            rows = [row for row in existing if row["step"] <= state.global_step]
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    @override
    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "train_runtime" in logs:  # the summary when training ends
            return
        row = {"step": state.global_step, "epoch": round(state.epoch or 0, 4)}
        row |= {key: value for key, value in logs.items() if key != "epoch"}
        if "loss" in logs:
            now = time.monotonic()
            seen = self.trainer.tokens_of_all()
            seconds = now - self.last_logged[0]
            tokens = seen - self.last_logged[1]
            row |= {"tokens": tokens, "seconds": round(seconds, 3)}
            row["tokens_per_second"] = round(tokens / max(seconds, 1e-9), 1)
            row["peak_memory_mb"] = peak_memory_mb()
            self.last_logged = (now, seen)
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

    @override
    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.accelerator.wait_for_everyone()  # until every process has written its shard
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def held_out_losses(path: Path, best: int | None) -> dict[str, float]:
    """The held-out losses of the final weights by name; empty if nothing was held out.

    Args:
        path: `metrics.jsonl`.
        best: Step of the best checkpoint if training ends with that one; None for the last step.
    """
    rows = [row for row in map(json.loads, path.read_text().splitlines()) if "eval_loss" in row]
    rows = [row for row in rows if not best or row["step"] == best]
    return {key: value for key, value in rows[-1].items() if key.startswith("eval_loss")} if rows else {}
