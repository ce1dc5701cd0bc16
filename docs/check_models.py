"""Compare what base models do with masks, packing and the running batch, and write down what was found.

`python docs/check_models.py` writes `src/mote/models/checked_bases.py`; the table of `docs/models.md` is made of that
(`make docs`). Each model is a tiny random copy of a configuration of transformers (`mote.inference.compare_base`).
"""

from pathlib import Path
from typing import Any

import transformers

from mote.inference.compare_base import TOLERANCE, answers_of, compare, copy_of, described, error_of
from mote.inference.sequential import SequentialLoop
from mote.models.capabilities import ABILITIES, EXPORTS, architecture_of
from mote.models.layers import layers_of

CHECKED = Path(__file__).parent.parent / "src" / "mote" / "models" / "checked_bases.py"
HYBRID = ["mamba", "attention"]

# Name in the table, model type of transformers, and what its configuration says beside the defaults.
BASES: list[tuple[str, str, dict[str, Any]]] = [
    ("Llama", "llama", {}),
    ("Mistral", "mistral", {"sliding_window": None}),
    ("Mistral with a window", "mistral", {}),
    ("Ministral", "ministral", {"head_dim": 128}),
    ("Mixtral", "mixtral", {}),
    ("Qwen 2", "qwen2", {}),
    ("Qwen 2 with a window", "qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}),
    ("Qwen 2 MoE", "qwen2_moe", {}),
    ("Qwen 3", "qwen3", {}),
    ("Qwen 3 MoE", "qwen3_moe", {}),
    ("Gemma", "gemma", {}),
    ("Gemma 2", "gemma2", {}),
    ("Gemma 3", "gemma3", {}),
    ("Gemma 3 (text)", "gemma3_text", {}),
    ("Gemma 3n (text)", "gemma3n_text", {}),
    ("Gemma 4", "gemma4", {}),
    ("Gemma 4 (text)", "gemma4_text", {}),
    ("Phi", "phi", {}),
    ("Phi 3", "phi3", {}),
    ("Phi 3 with a window", "phi3", {"sliding_window": 64}),
    ("OLMo", "olmo", {}),
    ("OLMo 2", "olmo2", {}),
    ("OLMo 3", "olmo3", {}),
    ("OLMoE", "olmoe", {}),
    ("SmolLM 3", "smollm3", {}),
    ("Granite", "granite", {}),
    ("Granite MoE", "granitemoe", {}),
    ("Cohere", "cohere", {}),
    ("Cohere 2", "cohere2", {}),
    ("Exaone 4", "exaone4", {}),
    ("Starcoder 2", "starcoder2", {}),
    ("Starcoder 2 with a window", "starcoder2", {"sliding_window": 64}),
    ("StableLM", "stablelm", {}),
    ("GLM", "glm", {}),
    ("GLM 4", "glm4", {}),
    ("GLM 4 MoE", "glm4_moe", {}),
    ("Seed-OSS", "seed_oss", {}),
    ("Helium", "helium", {}),
    ("Ernie 4.5", "ernie4_5", {}),
    ("Hunyuan", "hunyuan_v1_dense", {"head_dim": 128}),
    ("MiniMax M2", "minimax_m2", {}),
    ("Apertus", "apertus", {}),
    ("Nemotron", "nemotron", {"num_key_value_heads": 8}),
    ("Doge", "doge", {}),
    ("GPT-2", "gpt2", {}),
    ("GPT-NeoX", "gpt_neox", {}),
    ("GPT-J", "gptj", {}),
    ("GPT-Neo", "gpt_neo", {}),
    ("GPT BigCode", "gpt_bigcode", {}),
    ("OPT", "opt", {}),
    ("Falcon", "falcon", {}),
    ("Falcon with ALiBi", "falcon", {"alibi": True}),
    ("BLOOM", "bloom", {}),
    ("MPT", "mpt", {}),
    ("gpt-oss", "gpt_oss", {}),
    ("Llama 4", "llama4", {}),
    ("Llama 4 (text)", "llama4_text", {}),
    ("DeepSeek V2", "deepseek_v2", {"num_experts_per_tok": 2}),
    ("DeepSeek V3", "deepseek_v3", {}),
    ("MiniCPM 3", "minicpm3", {}),
    ("Granite 4, attention only", "granitemoehybrid", {"layer_types": ["attention"] * 32}),
    ("Granite 4 hybrid", "granitemoehybrid", {"layer_types": HYBRID * 16}),
    ("LFM 2", "lfm2", {"layer_types": ["conv", "full_attention"] * 16}),
    ("LFM 2 MoE", "lfm2_moe", {"layer_types": ["conv", "full_attention"] * 16}),
    ("Falcon H1", "falcon_h1", {}),
    ("Bamba", "bamba", {"attn_layer_indices": [1]}),
    ("Jamba", "jamba", {}),
    ("Qwen 3 Next", "qwen3_next", {}),
    ("Qwen 3.5", "qwen3_5", {}),
    ("Qwen 3.5 (text)", "qwen3_5_text", {}),
    ("Nemotron H", "nemotron_h", {}),
    ("Zamba 2", "zamba2", {}),
    ("OLMo Hybrid", "olmo_hybrid", {}),
    ("Kimi Linear", "kimi_linear", {}),
    ("MiniMax", "minimax", {}),
    ("RecurrentGemma", "recurrent_gemma", {}),
    ("Mamba", "mamba", {}),
    ("Falcon Mamba", "falcon_mamba", {}),
    ("Mamba 2", "mamba2", {}),
    ("RWKV", "rwkv", {}),
]


def config_of(model_type: str, values: dict[str, Any]) -> Any:
    """A configuration of transformers with the defaults of its architecture."""
    return transformers.CONFIG_MAPPING[model_type](**values)


def bases_table(_: str) -> str:
    """The table of bases, from what was found when they were compared."""
    bases = [(name, config_of(model_type, values)) for name, model_type, values in BASES]
    known = [(name, config, described(config)) for name, config in bases]
    forms = [form for form in EXPORTS if any(form in base.limits for _, _, base in known)]
    rows = []
    for name, config, base in known:
        kinds = dict.fromkeys(layer.name.removesuffix("_attention") for layer in layers_of(config))
        cells = ["refused" if ability in base.limits else "right" for ability in ABILITIES]
        if "answers" in base.limits:
            cells[-1] = "one at a time"
        written = ["refused" if form in base.limits else "yes" for form in forms]
        rows.append([name, f"`{config.model_type}`", ", ".join(kinds), *cells, *written])
    head = [
        "Base",
        "Type",
        "Layers",
        *(ability.capitalize() for ability in ABILITIES),
        *(f"`{form}`" for form in forms),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def main() -> None:
    """Compare every base and write what it cannot do; a base that `mote` could not use at all ends the script."""
    found: dict[str, tuple[str, ...]] = {}
    for name, model_type, values in BASES:
        config = config_of(model_type, values)
        failed = compare(config)
        copy = copy_of(config)
        if copy is None or failed is None:
            raise SystemExit(f"{name}: it cannot be compared")
        alone = error_of(lambda copy: answers_of(copy, SequentialLoop(copy.model)), copy)
        if "training" in failed or not alone <= TOLERANCE:
            raise SystemExit(f"{name}: its plain training or its single answers are wrong")
        if found.setdefault(architecture_of(config), failed) != failed:
            raise SystemExit(f"{name}: it differs from another base that is {architecture_of(config)}")
        print(f"{name}: {', '.join(failed) or 'all right'}", flush=True)
    lines = "".join(f'    "{architecture}": {failed!r},\n' for architecture, failed in sorted(found.items()))
    docstring = '"""Architectures that were compared, each with what it cannot do: made by `docs/check_models.py`."""'
    text = f"{docstring}\n\nCHECKED: dict[str, tuple[str, ...]] = {{\n{lines}}}  # fmt: skip\n"
    CHECKED.write_text(text.replace("'", '"'), encoding="utf-8")


if __name__ == "__main__":
    main()
