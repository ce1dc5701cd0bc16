"""Text files written whole or not at all; content hashes."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mote.core.errors import MoteError, UserError, first_line

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


def write_atomic(path: Path, text: str | Iterable[str]) -> None:
    """Write a whole text file, given at once or in parts, so that readers see the old one or the new one, never less.

    Raises:
        MoteError: The disk refused it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as sink:
            sink.writelines([text] if isinstance(text, str) else text)
            sink.flush()
            os.fsync(sink.fileno())
        temporary.replace(path)
    except OSError as error:
        raise MoteError(f"{path}: cannot be written ({error.strerror}); free space there and run again") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of a JSON value."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256_of(path: Path) -> str | None:
    """Content hash of a file, None where there is none."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
