"""Experts of a linear layer on a CPU, each for the tokens of its own kind: a kernel in C++ (`kernel.cpp`).

Of 32 answers that are written at once, a few are in each step. Products with the columns of all steps multiply three
times what is needed, and products for each step take so many calls that these cost more than they save. The kernel is
one call for a layer. The machine's own compiler makes it when a model is loaded, in about a second.
Shapes: T token, N token of some kind, K kind (a step, or the base model), P packed projection, C column (of E*R).
"""

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from mote.vllm.experts import Part

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
POINTER, NUMBER = ctypes.c_void_p, ctypes.c_int64
ARGUMENTS: list[Any] = [POINTER, NUMBER, POINTER, NUMBER, POINTER, POINTER, NUMBER, POINTER, NUMBER, *[POINTER] * 4]
REMEDY = "install g++, or name a C++ compiler in CXX"


def compiled() -> ctypes.CDLL:
    """The kernel, for this processor. Its threads are those of PyTorch's OpenMP, which is loaded already.

    Raises:
        RuntimeError: There is no compiler, or it cannot do it; with the remedy.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or "c++"]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "kernel.so"
        try:
            subprocess.run([*compiler, *FLAGS, str(SOURCE), "-o", str(library)], check=True, capture_output=True)
        except OSError as error:
            raise RuntimeError(f"CXX={shlex.join(compiler)}: {error.strerror}; {REMEDY}") from error
        except subprocess.CalledProcessError as error:
            lines = error.stderr.decode(errors="replace").strip().splitlines() or ["failed"]
            raise RuntimeError(f"CXX={shlex.join(compiler)}: {lines[0]}; {REMEDY}") from error
        kernel = ctypes.CDLL(str(library))
    kernel.mote_lanes.restype = NUMBER
    kernel.mote_add.restype = None
    kernel.mote_add.argtypes = ARGUMENTS
    return kernel


class OwnColumns:
    """The columns that each kind of token has of a layer's experts, as the kernel reads them.

    Args:
        kernel: See `compiled`.
        parts: The experts of each projection that has any, float32 on the CPU.
        gates: Gates of each kind (K, E*R): a kind's columns are those whose gate is not 0.
    """

    def __init__(self, kernel: ctypes.CDLL, parts: Sequence["Part"], gates: Tensor) -> None:
        self._add, lanes = kernel.mote_add, kernel.mote_lanes()
        self._held: list[Tensor] = []
        columns, firsts, seconds = [], [], []
        for gate in gates:
            own = gate.nonzero()[:, 0]
            missing = -len(own) % lanes
            columns.append(len(own) + missing)
            first = torch.cat([pad(part.first[own], (0, 0, 0, missing)) for part in parts])
            firsts.append(self._keep(_in_vectors(first, lanes)))
            for part in parts:
                second = pad(part.second[:, own] * gate[own], (0, missing, 0, -len(part.second) % lanes))
                seconds.append(self._keep(_in_vectors(second, lanes)))
        begins, widths = [part.outputs.start for part in parts], [len(part.second) for part in parts]
        tables = [self._keep(torch.tensor(table)) for table in (columns, begins, widths, firsts, seconds)]
        self._shapes = (len(gates), tables[0], len(parts), *tables[1:])

    def _keep(self, tensor: Tensor) -> int:
        """The address of a tensor, which stays as long as this."""
        self._held.append(tensor)
        return tensor.data_ptr()

    def add(self, out: Tensor, x: Tensor, rows: Tensor, starts: Tensor) -> None:
        """Add to the layer's outputs what the experts make of its inputs.

        Args:
            out: Outputs (T, out), changed in place.
            x: Inputs (T, in).
            rows: Indices (N,) of the tokens, those of a kind together in the order of the kinds.
            starts: Where those of each kind begin among them (K + 1,).
        """
        x = x.contiguous()
        given = x.data_ptr(), x.shape[1], out.data_ptr(), out.stride(0), rows.data_ptr(), starts.data_ptr()
        self._add(*given, *self._shapes)


def _in_vectors(weight: Tensor, lanes: int) -> Tensor:
    """A matrix (rows, columns), its rows in vectors: (rows / lanes, columns, lanes)."""
    return weight.view(len(weight) // lanes, lanes, weight.shape[1]).transpose(1, 2).contiguous()
