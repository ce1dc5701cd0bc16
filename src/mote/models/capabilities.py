"""What a base model can do: be trained, skip steps, pack rows, answer in a running batch, be exported.

How each architecture handles our masks and our cache was tested once and is listed in `CHECKED`. A model that is not
listed is tested on first use (`mote.inference.compare_base`); until then nothing that needs masks is enabled.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

from mote.core.records import Frozen
from mote.models.checked_bases import CHECKED
from mote.models.layers import indexed_scaling, layers_of, stateful_layers

Ability = Literal["training", "skipping", "draws", "packing", "answers"]
ABILITIES: tuple[Ability, ...] = ("training", "skipping", "draws", "packing", "answers")
MASKED: tuple[Ability, ...] = ("skipping", "draws", "packing")  # those that need our masks
VLLM = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")  # model types of the plugin's classes
_REMEDIES: dict[str, str] = {
    "training": "use another base model",
    "skipping": "use train.skip_p=0 without train.skip_pairs, or train.method=mote-built, which trains the shorter "
    "chains as rows of their own",
    "draws": "use train.skip_views=1",
    "packing": "use train.packing=false",
    "answers": "answers come one after the other through transformers' own cache, which is slower; for speed serve it "
    "elsewhere and give the address with --engine",
}

_YES, _NO = frozenset({"yes"}), frozenset({"no"})
# Names in a configuration that masks and caches do not depend on, and those that `layers_of` and `rope` know.
_WITHOUT_EFFECT = re.compile(
    r"^_|_ids?$|(^|_)act(ivation)?(_fn|_function)?$|(^|_)bias$|dropout|pdrop|dtype|init|use_cache|cache_impl|^tie_|label"
    r"|^output_|architectures|auto_map|return_dict|problem_type|model_type|version|quantization|head_dim|key_value_heads"
    r"|layer_types|layers_block_type|attn_idxs|attn_layer_indices|window|chunk_size|rope_parameters|rope_scaling"
)


class Capabilities(Frozen):
    """What a base model can do.

    Attributes:
        architecture: Its model type and kinds of layers (`architecture_of`).
        known: Whether the architecture has been compared; without that, nothing that needs masks is trusted.
        limits: What it cannot do -> why, and what to do instead. Keys are abilities and formats of `mote export`; with
            `answers` it answers one request at a time.
        longest: Rows up to this many tokens are exact under masks; in longer ones Doge's attention chooses among the
            tokens and Llama 4's depends on their index. None for other models.
    """

    architecture: str
    known: bool
    limits: dict[str, str]
    longest: int | None = None

    @property
    def takes_masks(self) -> bool:
        """Whether it is trained with our masks and positions; otherwise with plain rows and transformers' own."""
        return not all(ability in self.limits for ability in MASKED)

    def table(self) -> str:
        """The capabilities as text, for a terminal."""
        rows = []
        for name in (*ABILITIES, *EXPORTS):
            word = "yes" if name not in self.limits else "slow" if name == "answers" else "no"
            rows.append(f"{name:<13}{word:<6}{self.limits.get(name, '')}".rstrip())
        return "\n".join([f"base         {self.architecture}", *rows])


def architecture_of(config: Any) -> str:
    """What a comparison holds for: the model type, its kinds of layers, and how it differs from its type's defaults.

    Of numbers it counts whether they are 0: a size changes no mask, and a part that is there or not may.
    """
    kinds = sorted({layer.name if layer.reach or layer.kind != "full" else "attention" for layer in layers_of(config)})
    own = _flags(config.get_text_config(decoder=True).to_dict())
    try:
        default = _flags(type(config)().get_text_config(decoder=True).to_dict())
    except Exception:  # whatever a model's own code raises without arguments
        default = {}
    changes = []
    for name in sorted(own.keys() | default.keys()):
        flag = own.get(name, _NO)
        if flag != default.get(name, _NO):
            changes.append(name if flag == _YES else f"{name}={'/'.join(sorted(flag))}")
    return f"{config.model_type}: {', '.join([*kinds, *changes])}"


def _flags(values: Mapping[str, Any]) -> dict[str, frozenset[str]]:
    """Name -> words of a configuration: strings, and of other values whether they are set; of lists those of all."""
    flags: dict[str, frozenset[str]] = {}
    for name, value in values.items():
        if _WITHOUT_EFFECT.search(name):
            continue
        several = isinstance(value, list | tuple) and value
        flags[name] = frozenset(map(_word, value)) | _YES if several else frozenset({_word(value)})
        if isinstance(value, Mapping):
            flags |= _flags({f"{name}.{key}": part for key, part in value.items()})
    return flags


def _word(value: Any) -> str:
    return value if isinstance(value, str) else "yes" if value else "no"


def capabilities_of(config: Any, failed: Collection[str] | None = None) -> Capabilities:
    """The capabilities of a base model, from its configuration.

    Args:
        config: The base model's configuration.
        failed: Abilities that a comparison found wrong; by default what `CHECKED` says of the architecture.
    """
    architecture = architecture_of(config)
    failed = CHECKED.get(architecture) if failed is None else failed
    known = failed is not None
    why = _reason(config) if known else f"{architecture}: what it does with masks could not be compared"
    wrong = (*MASKED, "answers") if failed is None else failed
    limits: dict[str, str] = {ability: f"{why}; {_REMEDIES[ability]}" for ability in ABILITIES if ability in wrong}
    limits |= _export_limits(config)
    scaled = indexed_scaling(config)
    longest = getattr(config.get_text_config(decoder=True), "keep_window_size", scaled and scaled - 1)
    return Capabilities(architecture=architecture, known=known, limits=limits, longest=longest)


def _reason(config: Any) -> str:
    """Why an architecture lacks its missing abilities."""
    name = config.model_type
    if stateful := stateful_layers(config):
        return f"{name} has layers that keep a state ({', '.join(stateful)}), which no mask reaches"
    if getattr(config.get_text_config(decoder=True), "kv_lora_rank", None):
        return f"{name} has latent attention"
    return f"{name}: the logits of a tiny copy differ from those of each sequence by itself"


EXPORTS = ("peft-steps", "engine-steps", "merged", "vllm", "gguf", "gguf-steps")  # formats of `mote export`


def _export_limits(config: Any) -> dict[str, str]:
    """Formats of `mote export` that the base cannot be written in; `mote.tuner.gguf` knows those of llama.cpp."""
    limits = {}
    if getattr(config, "quantization_config", None):
        why = "the base is quantised, and nothing can be merged into its weights; give the model it was made of"
        limits = dict.fromkeys(("engine-steps", "merged", "vllm"), why)
    if config.model_type not in VLLM:
        served = f"vLLM serves step experts on {', '.join(VLLM)} only"
        limits["vllm"] = f"{served}, not on {config.model_type}; use mote serve, or --format engine-steps"
    return limits
