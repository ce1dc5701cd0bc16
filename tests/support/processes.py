"""`mote` commands in separate processes that start at once: forked from one that has imported everything."""

import multiprocessing
import os
import signal as signals
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
MODULES = [
    *("mote.cli", "mote.experiments.run", "mote.train", "mote.inference.model", "mote.inference.load"),
    *("mote.inference.engines.local", "mote.evals.suite"),
    *("transformers.models.llama.modeling_llama", "transformers.integrations.peft", "torch.distributed.tensor"),
]
LONGEST = 120  # seconds that any command may take; far more than it needs


def start(arguments: list[str], log: Path, prepare: Callable[[], None] | None = None) -> ForkServerProcess:
    """Start `mote ARGUMENTS`; what it prints goes to `log`, `prepare` is called in its process before anything else."""
    context = multiprocessing.get_context("forkserver")
    before = dict(os.environ)
    try:
        os.environ.update(ENVIRONMENT)
        context.set_forkserver_preload(MODULES)
        forkserver.ensure_running()  # takes the environment along
    finally:
        os.environ.clear()
        os.environ.update(before)
    process = context.Process(target=_command, args=(arguments, log, prepare), daemon=True)
    process.start()
    return process


def finish(arguments: list[str], log: Path, prepare: Callable[[], None] | None = None) -> tuple[int | None, str]:
    """Run `mote ARGUMENTS` to its end: the exit code (negative: the signal) and what it printed."""
    process = start(arguments, log, prepare)
    try:
        process.join(LONGEST)
        return process.exitcode, log.read_text() if log.exists() else ""
    finally:
        process.kill()
        process.join()


@contextmanager
def stopped_when(arguments: list[str], log: Path, begun: Callable[[], bool], signal: int) -> Iterator[int | None]:
    """Send a signal as soon as `begun`, wait for the end; gives the exit code, None where it ended before."""
    process = start(arguments, log)
    try:
        deadline = time.monotonic() + LONGEST
        while not begun() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.0005)
        alive = process.is_alive()
        if alive and process.pid:
            os.kill(process.pid, signal)
        process.join(LONGEST)
        yield process.exitcode if alive else None
    finally:
        process.kill()
        process.join()


def _command(arguments: list[str], log: Path, prepare: Callable[[], None] | None) -> None:
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.argv = ["mote", *arguments]
    signals.signal(signals.SIGINT, signals.default_int_handler)  # which a shell's background jobs have switched off
    if prepare is not None:
        prepare()
    from mote.cli import main

    main()
