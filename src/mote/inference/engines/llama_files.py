"""GGUF files for the llama.cpp engine: made from an adapter or a base model on first use, and cached.

The cache folder's `gguf/` has a folder for each adapter (by a hash of its weights and settings), base model and type.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import load_peft_weights

from mote.core.errors import UserError, first_line
from mote.core.files import atomic_folder, disk_errors, write_json
from mote.core.machine import gguf_folder
from mote.inference.engines.llama_batch import GgufFiles
from mote.inference.engines.llama_library import CacheType, load_library
from mote.models.load import Base, completed, load_config, load_generation_config, load_tokenizer
from mote.tuner.gguf.architectures import Form, refusals
from mote.tuner.gguf.file import Type
from mote.tuner.gguf.source import Adapter, BaseWeights
from mote.tuner.gguf.steps import StepFiles, check_steps, step_files, write_base, write_steps
from mote.tuner.gguf.switch import base_tokens, check_switch, write_switch

_VERSION = 2  # version of the files' layout; files of other versions are not used
_ONE_FILE = "model.gguf"
_BASE_FILE = "base.gguf"
_AGAIN = "run the same command again"
_TYPES: dict[str, Type] = {"auto": "q8_0", "float32": "f32", "float16": "f16"}


def check_engine(device: str, dtype: str) -> None:
    """Check, before any work, that llama.cpp is installed and can compute with these settings.

    Raises:
        UserError: It is not, or cannot.
    """
    load_library()
    type_of(dtype)
    if device not in ("auto", "cpu"):
        raise UserError(f"device: the engine llamacpp runs on a CPU, not on {device}; leave it out")


def check_model(model: str, revision: str | None, device: str, dtype: str) -> None:
    """As `check_engine`, and check that a base model can be written as GGUF.

    Raises:
        UserError: It cannot.
    """
    check_engine(device, dtype)
    reason = None if is_gguf(model) else refusals(load_config(model, revision))["gguf-steps"]
    if reason is not None:
        raise UserError(f"engine: llamacpp cannot run '{model}': {reason}; use --engine transformers")


def type_of(dtype: str) -> Type:
    """The type of a file's matrices: `auto` is q8_0.

    Raises:
        UserError: The engine does not support this dtype.
    """
    if dtype not in _TYPES:
        raise UserError(f"dtype: the engine llamacpp does not support {dtype}; use {', '.join(_TYPES)} (auto is q8_0)")
    return _TYPES[dtype]


def adapter_files(
    adapter: Adapter, model: str, revision: str | None = None, dtype: str = "auto", sequences: int = 1
) -> GgufFiles:
    """The files of a trained adapter, in the form that is faster for as many sequences at once.

    Raises:
        UserError: Neither form can compute what the adapter does.
        MoteError: The files cannot be written.
    """
    kind = type_of(dtype)
    base = BaseWeights(model, revision)
    try:
        trained = check_steps(adapter, base)
    except UserError as error:
        reason = str(error).rpartition("; ")[0]  # the remedy is that of an export
        raise UserError(f"engine: llamacpp cannot run this adapter: {reason}; use --engine transformers") from error
    form = _form(adapter, base, sequences)
    folder = _folder(Path(adapter.path).name or "adapter", kind, form, base.fingerprint(), _fingerprint(adapter))
    if not folder.is_dir():
        with _making(folder, {"adapter": adapter.path, "model": model, "type": kind, "form": form}) as scratch:
            if form == "gguf":
                write_switch(scratch / _ONE_FILE, adapter, base, kind, kind)
            else:
                write_steps(scratch, adapter, base, kind, kind)
    if form == "gguf":
        return GgufFiles(folder / _ONE_FILE, (), base_tokens(adapter, base, trained), _cache(kind))
    files: StepFiles = step_files(folder, adapter.config.experts)
    return GgufFiles(files.base, tuple(files.loras.values()), cache=_cache(kind))


def _form(adapter: Adapter, base: BaseWeights, sequences: int) -> Form:
    """One file if several sequences run: with LoRAs those in different steps need a forward pass for each step."""
    if sequences == 1:
        return "gguf-steps"
    try:
        check_switch(adapter, base)
    except UserError:
        return "gguf-steps"
    return "gguf"


def base_files(model: str, tokenizer: Any, revision: str | None = None, dtype: str = "auto") -> GgufFiles:
    """The file of a base model: the GGUF that it names, or one made of its weights.

    Raises:
        UserError: The model cannot be written as GGUF.
        MoteError: The file cannot be written.
    """
    if is_gguf(model):
        return GgufFiles(Path(model).absolute(), cache=_cache(type_of(dtype)))
    kind = type_of(dtype)
    base = BaseWeights(model, revision)
    folder = _folder(Path(model).name, kind, base.fingerprint())
    if not folder.is_dir():
        with _making(folder, {"model": model, "type": kind, "form": "base"}) as scratch:
            write_base(scratch / _BASE_FILE, base, tokenizer, kind)
    return GgufFiles(folder / _BASE_FILE, cache=_cache(kind))


@dataclass(frozen=True)
class Configurations:
    """Takes the place of a transformers model whose weights are in llama.cpp."""

    config: Any
    generation_config: Any


def open_base(model: str, revision: str | None = None) -> Base:
    """A base model's tokenizer and configurations, without its weights.

    Raises:
        UserError: The model cannot be read.
    """
    if not is_gguf(model):
        configurations = Configurations(load_config(model, revision), load_generation_config(model, revision))
        return Base(model, configurations, load_tokenizer(model, revision))
    from transformers import AutoConfig, AutoTokenizer

    path = Path(model).absolute()
    if not path.is_file():
        raise UserError(f"model: there is no file '{model}'; give a GGUF file, a model folder or a hub id")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except (OSError, ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"model: transformers cannot read the tokenizer of '{model}' ({first_line(error)}); give the model's folder"
        ) from error
    return Base(model, Configurations(config, config), completed(tokenizer))


def is_gguf(model: str) -> bool:
    """Whether a model is named as a GGUF file."""
    return model.endswith(".gguf")


def _cache(kind: Type) -> CacheType:
    """Type of keys and values beside these weights; with f32 all is exact."""
    return "f32" if kind == "f32" else "f16"


def _folder(name: str, *parts: str) -> Path:
    digest = hashlib.sha256("/".join((str(_VERSION), *parts)).encode()).hexdigest()[:12]
    safe = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in name)
    return gguf_folder() / f"{safe}-{parts[0]}-{digest}"


@contextmanager
def _making(folder: Path, about: dict[str, str]) -> Iterator[Path]:
    print(f"mote: writing {about['type']} GGUF files for llama.cpp, once, into {folder}", file=sys.stderr)
    with disk_errors("engine", folder, _AGAIN), atomic_folder(folder) as scratch:
        yield scratch
        write_json(scratch / "about.json", about)


def _fingerprint(adapter: Adapter) -> str:
    """A hash of an adapter's settings, tokenizer and weights."""
    settings = {key: value for key, value in adapter.config.to_dict().items() if key != "base_model_name_or_path"}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    digest.update(adapter.tokenizer.backend_tokenizer.to_str().encode())
    digest.update(repr(adapter.scheme.depths).encode())
    for name, weight in sorted(load_peft_weights(adapter.path, device="cpu").items()):
        digest.update(name.encode())
        digest.update(weight.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
