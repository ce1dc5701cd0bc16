"""Question files and data sets of the hub -> raw rows, each with its place.

The layout (JSONL, a JSON list, CSV or TSV, plain text, Parquet; gzipped or not) is detected from the file's bytes. What
a row means is left to `mote.questions.formats`.
"""

import csv
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from mote.core.errors import UserError, first_line
from mote.questions.columns import Row, short
from mote.questions.formats import UNDERSTOOD, is_known

OWN = {
    "mote:train": "train.jsonl",
    "mote:test": "test.jsonl",
    "mote:arithmetic": "arithmetic.jsonl",
    "mote:arithmetic-test": "arithmetic-test.jsonl",
}
_PARQUET = b"PAR1"
_LONGEST_CELL = 2**31 - 1  # characters; the csv module's default of 131,072 refuses files with a long column


def raw_rows(source: str) -> Iterator[tuple[str, Row]]:
    """The raw rows of a question source, each with its place.

    Args:
        source: As in `iter_questions`.

    Raises:
        UserError: It cannot be read.
    """
    if source.startswith("hub:"):
        yield from _hub_rows(source)
        return
    if source.startswith("mote:") and source not in OWN:
        raise UserError(f"questions: '{source}' is not a set of this package; use one of {list(OWN)} or a path")
    own = str(resources.files("mote.questions") / "data" / OWN[source]) if source in OWN else ""
    yield from rows_of(Path(own or os.path.expanduser(source)))


def _hub_rows(source: str) -> Iterator[tuple[str, Row]]:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise UserError(f"questions: {source} needs the package datasets; install mote-align[eval]") from error
    name, _, split = source.removeprefix("hub:").partition("@")
    try:
        rows = load_dataset(name, split=split or "test")
    except (OSError, ValueError) as error:  # of the hub's client: name, split, access, network
        raise UserError(
            f"questions: cannot load {source} ({first_line(error)}); check the name, the split and your access, or "
            "give a file"
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"{source} row {number}", row


def rows_of(path: Path) -> Iterator[tuple[str, Row]]:
    """The raw rows of a file, each with its place.

    Raises:
        UserError: The file cannot be read.
    """
    with _opened(path) as file:
        for place, row in _parquet_rows(path) if isinstance(file, Path) else _rows(file, path):
            yield f"{path} {place}", row


@contextmanager
def _opened(path: Path) -> Iterator[Iterable[bytes] | Path]:
    """The file's lines, decompressed, or the path of a Parquet file; read errors become one line."""
    try:
        with open(path, "rb") as raw:
            if raw.peek(4)[:4] == _PARQUET:
                yield path
            elif raw.peek(2)[:2] == b"\x1f\x8b":
                with gzip.open(raw) as unzipped:
                    yield unzipped
            elif path.suffix == ".gz":
                raise UserError(f"questions: {path} is named .gz but is not gzip; get it again or rename it")
            else:
                yield raw
    except FileNotFoundError as error:
        raise UserError(f"questions: {path} does not exist; give a path, or one of {list(OWN)}") from error
    except IsADirectoryError as error:
        raise UserError(f"questions: {path} is a folder; give a file in it") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"questions: {path} is damaged or cut off gzip ({error}); get the file again") from error
    except OSError as error:
        raise UserError(f"questions: {path} cannot be read ({error.strerror or error}); check its rights") from error


def _rows(file: Iterable[bytes], path: Path) -> Iterator[tuple[str, Row]]:
    """Rows and their places; the first line that is not blank tells the layout."""
    lines = _lines(file, path)
    first = next(((number, line) for number, line in lines if line.strip()), None)
    if first is None:
        raise UserError(f"questions: {path} is empty; give a file with at least one question")
    number, line = first
    lines = _chain(first, lines)
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    delimiter = "\t" if "\t" in line else ","
    columns = {column.strip().strip('"') for column in line.split(delimiter)}
    if line.lstrip().startswith("{"):
        return _json_lines(lines, path)
    if suffix == ".txt":
        return ((f"line {number}", {"text": line}) for number, line in lines if line.strip())
    if line.lstrip().startswith("["):
        return _json_list(lines, path)
    if suffix in (".json", ".jsonl"):
        return _json_lines(lines, path)
    if suffix in (".csv", ".tsv") or is_known(columns):
        return _csv_rows(lines, path, delimiter, blank=number - 1)
    raise UserError(
        f"questions: {path} line {number}: {short(line.strip())} is neither a JSON object nor a line of known columns "
        f"({UNDERSTOOD}); name a file of one question a line .txt"
    )


def _chain(first: tuple[int, str], rest: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    yield first
    yield from rest


def _lines(file: Iterable[bytes], path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(file, 1):
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            wrong = line[error.start : error.start + 4]
            raise UserError(
                f"questions: {path} line {number}: {wrong!r} is not UTF-8; convert the file, for instance with "
                "iconv -f latin1 -t utf-8"
            ) from error


def _json_lines(lines: Iterator[tuple[int, str]], path: Path) -> Iterator[tuple[str, Row]]:
    for number, line in lines:
        if not line.strip():
            continue
        where = f"questions: {path} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if not line.endswith("\n"):
                raise UserError(
                    f"{where}: the file seems cut off in its last line, {short(line)}; get it again or remove that line"
                ) from error
            raise UserError(
                f"{where}: {short(line.strip())} is not valid JSON ({first_line(error)}); write one object a line"
            ) from error
        yield f"line {number}", _object(row, where)


def _json_list(lines: Iterator[tuple[int, str]], path: Path) -> Iterator[tuple[str, Row]]:
    first, text = next(lines)
    text += "".join(line for _, line in lines)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        before = text[: error.pos + 1].rstrip().splitlines()  # a truncated list fails after its last character
        number = first + len(before) - 1
        what = f"not valid JSON ({error.msg})" if text[error.pos :].strip() else "the file seems cut off"
        near = short(before[-1].strip())
        raise UserError(f"questions: {path} line {number}: {what} at {near}; get it again or fix that line") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"questions: {path}: not a list of questions ({first_line(error)}); fix it") from error
    for number, row in enumerate(rows, 1):
        yield f"row {number}", _object(row, f"questions: {path} row {number}")


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f'{where}: {short(row)} is not a JSON object; write for instance {{"question": "..."}}')
    return row


def _csv_rows(lines: Iterator[tuple[int, str]], path: Path, delimiter: str, blank: int) -> Iterator[tuple[str, Row]]:
    """Rows of a CSV or TSV file after `blank` empty lines; a row's place is the line it ends on."""
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.DictReader((line for _, line in lines), strict=True, delimiter=delimiter)
    try:
        for row in reader:
            yield f"line {blank + reader.line_num}", row
    except csv.Error as error:
        raise UserError(
            f"questions: {path} line {blank + reader.reader.line_num}: not valid CSV ({error}); the file may be cut "
            "off: fix the quotes there or get it again"
        ) from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise UserError(f"questions: {path} is a Parquet file; pip install 'mote-align[data]' to read it") from error
    number = 0
    try:
        for batch in ParquetFile(path).iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except ArrowException as error:
        raise UserError(
            f"questions: {path} is a damaged or cut off Parquet file ({first_line(error)}); get it again"
        ) from error
