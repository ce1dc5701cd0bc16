"""Folders that other libraries write: there as a whole or not at all, and a full disk is one line."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from mote.errors import MoteError, UserError
from mote.steps import first_line

# What torch and tokenizers say of a disk that takes no more, in exceptions of no kind of their own.
_DISK = re.compile(r"PytorchStreamWriter|inline_container|iostream|file write|\(os error \d+\)")


@contextmanager
def writing(stage: str, folder: Path, remedy: str) -> Iterator[None]:
    """Turns what the four writers (Python, safetensors, torch, tokenizers) say of a full disk into one line.

    Raises:
        MoteError: The disk refused what was written inside.
    """
    try:
        yield
    except Exception as error:
        text = getattr(error, "strerror", None) or first_line(error)
        if not isinstance(error, OSError | SafetensorError) and not _DISK.search(text):
            raise
        raise MoteError(f"{stage}: {folder} cannot be written ({text}); free space there, then {remedy}") from error


def check_new(folder: Path) -> None:
    """Make sure that a folder can be made without losing what is there.

    Raises:
        UserError: Something is there already.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"out: {folder} exists and is not empty; give another folder with --out, or remove that one")


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder to write to, beside the one it becomes at the end; where that is not reached, nothing is left."""
    folder = folder.absolute()
    scratch = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        yield scratch
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
