"""A base model as one GGUF file, and a LoRA for the question and for each step: for every architecture known here.

The base file holds the trained rows of the markers and is the base model otherwise, so that all adapters of one base
differ in these rows only. The program that reads the files must switch LoRAs at start markers (docs/decisions/0045).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mote.core.errors import UserError
from mote.tuner.gguf.architectures import (
    ARCHITECTURES,
    add_shape,
    base_entries,
    check_layers,
    gguf_name,
    refusals,
    rotary_rows,
)
from mote.tuner.gguf.file import FILE_TYPES, Entry, Type, gguf_file, stored_type
from mote.tuner.gguf.source import EMBEDDING, HEAD, Adapter, BaseWeights, Experts, matrix, vocabulary_rows
from mote.tuner.gguf.vocabulary import add_vocabulary, check_vocabulary

QUESTION = "question"


@dataclass(frozen=True)
class StepFiles:
    """Files of an adapter.

    Attributes:
        base: The base model with the markers' rows.
        loras: `question` and each step -> the LoRA that reads its tokens.
    """

    base: Path
    loras: dict[str, Path]


def step_files(folder: Path, experts: tuple[str, ...]) -> StepFiles:
    """The files that `write_steps` writes to a folder."""
    return StepFiles(folder / "base.gguf", {name: folder / f"{name}.gguf" for name in (QUESTION, *experts)})


def write_steps(
    folder: Path, adapter: Adapter, base: BaseWeights, wanted: Type = "q8_0", experts: Type = "f16"
) -> StepFiles:
    """Write the base model and a LoRA for the question and for each step.

    Args:
        folder: Folder of the files.
        adapter: A trained adapter.
        base: Its base model.
        wanted: Type of the base model's matrices.
        experts: Type of the LoRAs.

    Raises:
        UserError: The files could not compute what the adapter does; nothing is written.
        MoteError: A file cannot be written.
    """
    trained = check_steps(adapter, base)
    files = step_files(folder, adapter.config.experts)
    write_base(files.base, base, adapter.tokenizer, wanted, trained)
    for step, path in enumerate(files.loras.values()):
        _write_lora(path, base, trained, step, experts)
    return files


def check_steps(adapter: Adapter, base: BaseWeights) -> Experts:
    """The experts of an adapter, if they can be written as LoRAs.

    Raises:
        UserError: The base model or the adapter cannot be expressed.
    """
    if (reason := refusals(base.config)["gguf-steps"]) is not None:
        raise UserError(f"model: '{base.name}' cannot be written as GGUF: {reason}; use `mote answer`")
    trained = Experts(adapter, base)
    check_layers(base, trained.modules)
    check_vocabulary(adapter.tokenizer, trained)
    return trained


def write_base(path: Path, base: BaseWeights, tokenizer: Any, wanted: Type, trained: Experts | None = None) -> None:
    """Write a base model, with an adapter's marker rows if given.

    Args:
        path: The file.
        base: The base model.
        tokenizer: The adapter's tokenizer, or the base model's.
        wanted: Type of the matrices.
        trained: The adapter's experts.

    Raises:
        UserError: The base model cannot be expressed; nothing is written.
        MoteError: The file cannot be written.
    """
    if (reason := refusals(base.config)["gguf-steps"]) is not None:
        raise UserError(f"model: '{base.name}' cannot be written as GGUF: {reason}; leave out --engine llamacpp")
    check_vocabulary(tokenizer, trained)
    rows = vocabulary_rows(base, trained)
    entries = [*_matrices(base, trained, rows, wanted), *base_entries(base, wanted)]
    with gguf_file(path, ARCHITECTURES[base.config.model_type].name, entries) as writer:
        writer.add_file_type(FILE_TYPES[wanted])
        writer.add_name(path.stem)
        add_shape(writer, base.config, rows)
        add_vocabulary(writer, tokenizer, rows, trained)


def _matrices(base: BaseWeights, trained: Experts | None, rows: int, wanted: Type) -> Iterator[Entry]:
    for name, stored in ((EMBEDDING, "token_embd.weight"), (HEAD, "output.weight")):
        if f"{name}.weight" in base.parameters:
            shape = (rows, base.config.hidden_size)
            yield Entry(stored, shape, stored_type(wanted, shape), partial(matrix, base, trained, name, rows))


def _write_lora(path: Path, base: BaseWeights, trained: Experts, step: int, wanted: Type) -> None:
    entries = []
    for module in trained.modules:
        outputs, inputs = base.parameters[f"{module}.weight"]
        rank = trained.lora_rank(module, step)
        shapes = {"lora_a": (rank, inputs), "lora_b": (outputs, rank)}
        for index, (suffix, shape) in enumerate(shapes.items()):
            name = f"{gguf_name(base.config, f'{module}.weight')}.{suffix}"
            read = partial(_lora_part, base, trained, module, step, index)
            entries.append(Entry(name, shape, stored_type(wanted, shape), read))
    with gguf_file(path, ARCHITECTURES[base.config.model_type].name, entries) as writer:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 0.0)  # scale 1 for layers of any rank: it is folded into B


def _lora_part(base: BaseWeights, trained: Experts, module: str, step: int, index: int) -> Tensor:
    """A (index 0) or B (1) of a step's LoRA, in the file's order of rows."""
    part = trained.lora(module, step)[index]
    return rotary_rows(base.config, module, part) if index else part
