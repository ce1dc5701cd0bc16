"""Files and folders that are written atomically, errors of a full disk, and content hashes."""

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

# torch and tokenizers report a full disk in generic exceptions.
_DISK = re.compile(r"PytorchStreamWriter|inline_container|iostream|file write|\(os error \d+\)")


@contextmanager
def disk_errors(stage: str, folder: Path, remedy: str) -> Iterator[None]:
    """Turn write errors of Python, safetensors, torch and tokenizers into one line with a remedy.

    Raises:
        MoteError: A write inside the context failed.
    """
    try:
        yield
    except Exception as error:
        text = getattr(error, "strerror", None) or first_line(error)
        if not isinstance(error, OSError | SafetensorError) and not _DISK.search(text):
            raise
        raise MoteError(f"{stage}: {folder} cannot be written ({text}); free space there, then {remedy}") from error


def check_new(folder: Path) -> None:
    """Check that a folder can be created without overwriting anything.

    Raises:
        UserError: It exists and is not an empty folder.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"out: {folder} exists and is not empty; give another folder with --out, or remove that one")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `folder` at the end of the context; after an error nothing remains."""
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
    """Write a text file, given as one text or in parts, atomically: readers see the old content or the new.

    Raises:
        MoteError: It cannot be written.
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
    """Hex sha256 of a file's content; None if the file does not exist."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
