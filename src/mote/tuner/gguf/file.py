"""Writes a GGUF file atomically, one tensor in memory at a time.

Shapes are those of torch; GGUF lists the axes in the opposite order.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quant_shape_to_byte_shape, quantize
from torch import Tensor

from mote.core.errors import MoteError
from mote.core.files import disk_errors

Type = Literal["f32", "f16", "q8_0"]
FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}
_Q8_0 = GGMLQuantizationType.Q8_0
_BLOCK = 32  # values of a Q8_0 block


def usual_experts(base: Type) -> Type:
    """The default type of experts beside a base model of this type: f32 keeps all exact."""
    return "f32" if base == "f32" else "f16"


@dataclass(frozen=True)
class Entry:
    """A tensor to be written.

    Attributes:
        name: Its name in the file.
        shape: Its shape.
        type: Type it is stored in.
        read: Returns it in float32.
    """

    name: str
    shape: tuple[int, ...]
    type: Type
    read: Callable[[], Tensor]


def stored_type(wanted: Type, shape: tuple[int, ...]) -> Type:
    """The type in which a tensor is stored: vectors as f32, matrices whose rows have no whole blocks as f16."""
    if len(shape) < 2:
        return "f32"
    return "f16" if wanted == "q8_0" and shape[-1] % _BLOCK else wanted


@contextmanager
def gguf_file(path: Path, architecture: str, entries: Iterable[Entry]) -> Iterator[Any]:
    """A `GGUFWriter` that takes the metadata in the context; at its end the file is written, after an error nothing.

    Args:
        path: The file.
        architecture: llama.cpp's name of the architecture.
        entries: The tensors, read one at a time.

    Raises:
        MoteError: The file cannot be written, or a value does not fit its type.
    """
    scratch = path.with_name(f".{path.name}.tmp")
    entries = list(entries)
    writer = GGUFWriter(scratch, architecture)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    try:
        yield writer
        with disk_errors("export", path, "run the same command again"):
            path.parent.mkdir(parents=True, exist_ok=True)
            for entry in entries:
                _announce(writer, entry)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for entry in entries:
                writer.write_tensor_data(encoded(entry))
            writer.flush()
            for file in writer.fout or ():
                os.fsync(file.fileno())
            writer.close()
            scratch.replace(path)
    finally:
        writer.close()
        scratch.unlink(missing_ok=True)


def _announce(writer: GGUFWriter, entry: Entry) -> None:
    """Add a tensor's name, shape and type to the file's list."""
    if entry.type == "q8_0":
        shape = quant_shape_to_byte_shape(entry.shape, _Q8_0)
        writer.add_tensor_info(entry.name, shape, np.dtype(np.uint8), math.prod(shape), _Q8_0)
    else:
        dtype = np.dtype(np.float16 if entry.type == "f16" else np.float32)
        writer.add_tensor_info(entry.name, entry.shape, dtype, math.prod(entry.shape) * dtype.itemsize)


def encoded(entry: Entry) -> np.ndarray[Any, Any]:
    """A tensor's values as they are stored.

    Raises:
        MoteError: A value does not fit the type.
    """
    values = entry.read().contiguous().numpy()
    assert values.shape == entry.shape, (entry.name, values.shape, entry.shape)
    if entry.type == "q8_0":
        return quantize(values, _Q8_0)
    with np.errstate(over="ignore"):
        stored = values.astype(np.float16 if entry.type == "f16" else np.float32, copy=False)
    if not np.isfinite(stored).all():
        raise MoteError(f"export: {entry.name} has values that {entry.type} cannot hold; use --quantise f32")
    return stored
