"""Which base models can hold step experts; others are refused by name before the model is changed.

Knows layer types and quantisation methods; knows nothing of markers, routing or the experts' arithmetic.
"""

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule, check_target_module_exists
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from mote.tuner.config import MoteConfig

# Quantisation methods whose layers give no gradient to their input or support no adapter. Some quantise only experts or
# embeddings, so the targeted layers do not show it.
_UNSUPPORTED = {
    "aqlm", "auto-round", "awq", "bitnet", "eetq", "fbgemm_fp8", "fouroversix", "fp8", "fp_quant", "gemma", "gptq",
    "higgs", "hqq", "metal", "mxfp4", "mxfp8", "nvfp4", "quark", "sinq", "spqr", "vptq",
}  # fmt: skip
_SUPPORTED = "torch.nn.Linear, the 8-bit and 4-bit layers of bitsandbytes and transformers' Conv1D"


def check_base(model: nn.Module, config: MoteConfig) -> None:
    """Check that every layer a config targets can hold step experts, so that none is silently left out.

    Args:
        model: The base model, with or without adapters.
        config: The adapter to add.

    Raises:
        ValueError: A quantisation method, a layer or an expert weight is unsupported, or a target matches no layer.
    """
    _check_quantisation(model)
    targets = config.target_modules
    everything = isinstance(targets, str) and targets.lower() == "all-linear"
    if isinstance(targets, str) and (config.layers_to_transform is not None or config.layers_pattern is not None):
        raise ValueError(
            f"layers_to_transform={config.layers_to_transform!r}, layers_pattern={config.layers_pattern!r}: they do "
            f"not go with target_modules={targets!r}; give target_modules a list of names"
        )
    get: Any = getattr(model, "get_output_embeddings", None)
    head = get() if get else None
    names: list[str] = []
    for name, module in _base_modules(model):
        names.append(name)
        found = check_target_module_exists(config, name)
        if isinstance(found, _ExcludedModule) or isinstance(module, BaseTunerLayer):
            continue
        wanted = _is_linear(module) and module is not head if everything else bool(found)
        for parameter, weight in module.named_parameters(name, recurse=False):
            fused = weight.ndim > 2 and weight.shape[0] > 1 and not isinstance(module, _ConvNd)
            if fused and (everything or wanted or check_target_module_exists(config, parameter)):
                raise ValueError(
                    f"target_modules={_shown(targets)}: {parameter} ({type(module).__name__}) holds "
                    + (
                        "fused 3-D expert weights, which cannot hold step experts; name the attention layers instead, "
                        "such as ['q_proj', 'k_proj', 'v_proj', 'o_proj']"
                        if "expert" in parameter
                        else "3-D weights, which cannot hold step experts; name the linear layers instead, "
                        f"target_modules={_called_layers(model)}"
                    )
                )
        if wanted and module is head and config.markers:
            raise ValueError(
                f"target_modules={_shown(targets)}: {name} is the output head, whose marker rows are trained by "
                "themselves; leave it out (exclude_modules) or give no markers"
            )
        if wanted and (reason := _refusal(module)):
            raise ValueError(
                f"target_modules={_shown(targets)}: {name} is a {type(module).__name__}, which cannot hold step "
                f"experts ({reason}); target layers of these kinds: {_SUPPORTED}"
            )
        if wanted and _is_read_directly(model, name):
            raise ValueError(
                f"target_modules={_shown(targets)}: {name} is never called: the model reads its weight directly, as "
                "Mamba's fused kernels do, so experts there would be ignored; name the other layers, "
                f"target_modules={_called_layers(model)}"
            )
    _check_names([] if targets is None or isinstance(targets, str) else targets, names)


def _check_names(targets: Iterable[str], names: Sequence[str]) -> None:
    """Check that each target is the name of a module, or the end of one."""
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            raise ValueError(
                f"target_modules: {target!r} is the name of no layer of this base, so nothing would be adapted for it; "
                "leave it out or use target_modules='all-linear'"
            )


def _check_quantisation(model: nn.Module) -> None:
    quantised: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    method = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
    method = getattr(method, "value", method)
    if method in _UNSUPPORTED:
        raise ValueError(
            f"quantization_config.quant_method='{method}': its layers give no gradient to their input or take no "
            "adapter beside them; load the base unquantised or with bitsandbytes (BitsAndBytesConfig)"
        )


def _base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules of the model, except those inside an adapted layer."""
    inside: list[str] = []
    for name, module in model.named_modules():
        if name and not name.startswith(tuple(inside)):
            yield name, module
            if isinstance(module, BaseTunerLayer):
                inside.append(f"{name}.")


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is any kind of linear layer; quantised ones are often no `nn.Linear`."""
    return isinstance(module, nn.Linear | Conv1D) or hasattr(module, "in_features") or hasattr(module, "infeatures")


def _is_read_directly(model: nn.Module, name: str) -> bool:
    """Whether the code of the module around a layer reads the layer's weight without calling the layer.

    PEFT refuses such layers by a list of model types, which knows neither Jamba nor Bamba.
    """
    parent, _, own = name.rpartition(".")
    try:
        source = inspect.getsource(type(model.get_submodule(parent)))
    except (OSError, TypeError):  # no source: a class made at run time
        return False
    read = re.compile(rf"self\.{own}\.weight(,|\)| @|$)")
    return any(read.search(line) for line in source.splitlines() if "init" not in line)


def _called_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers that can hold experts, without the head."""
    get: Any = getattr(model, "get_output_embeddings", None)
    head = get() if get else None
    called: dict[str, bool] = {}
    for name, module in _base_modules(model):
        if _is_linear(module) and module is not head:
            own = name.rpartition(".")[2]
            fits = _refusal(module) is None and not _is_read_directly(model, name)
            called[own] = called.get(own, True) and fits
    return sorted(own for own, fits in called.items() if fits and own.isidentifier())


def _refusal(module: nn.Module) -> str | None:
    """Why a module cannot hold step experts; None if it can."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight and never calls it"
    if isinstance(module, Conv1D) or type(module).__module__.startswith("bitsandbytes."):
        return None
    if not isinstance(module, nn.Linear):
        return "it is no torch.nn.Linear"
    dtype = module.weight.dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        return f"its {dtype} weight gives no gradient to its input"
    return None


def _shown(targets: Any) -> str:
    return repr(targets if targets is None or isinstance(targets, str) else sorted(targets))
