"""Estimate the memory that training needs from the model's shape, and advise on settings if it does not fit.

Legend: A trained parameters, D hidden size, F intermediate size.
"""

from mote.core.methods import METHODS
from mote.core.recipe import Recipe
from mote.models.shapes import ModelShape, count_parameters, experts_of, linear_shapes

TILE = 256  # tokens whose logits are in memory at once (mote.train.loss)
RUNTIME_BYTES = 0.6e9  # Python and its libraries
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_QUANTISED = {"8bit": 1.0, "4bit": 0.53}  # bytes of a quantised weight; in 4 bits 64 weights share a constant


def weights_bytes(shape: ModelShape, dtype: str, quantization: str = "none") -> float:
    """Bytes of the base model's weights; quantisation covers the linear layers of the blocks, not the embeddings."""
    linear = shape.layers * sum(inputs * outputs for inputs, outputs in linear_shapes(shape).values())
    rest = count_parameters(shape) - linear
    return rest * BYTES[dtype] + linear * _QUANTISED.get(quantization, BYTES[dtype])


def block_bytes(recipe: Recipe, shape: ModelShape, dtype: str, steps: int) -> int:
    """Bytes that a block saves per token for the backward pass.

    Each of the two norms saves its input and the normalised input in float32, and its output, D each; attention its
    queries, keys, values and output; the MLP 4 F; each linear layer the width of its experts. With token-gated experts,
    two per token, each layer also saves input and output of both.

    Args:
        recipe: The recipe, with its method applied.
        shape: Shape of the base model.
        dtype: Dtype of its weights.
        steps: Number of trained steps.
    """
    size = BYTES[dtype]
    linear = linear_shapes(shape)
    queries = linear["self_attn.q_proj"][1]
    keys = linear["self_attn.k_proj"][1]
    values = 2 * queries + 2 * keys + 4 * shape.intermediate
    values += recipe.experts.r * experts_of(recipe, steps) * len(linear)
    if METHODS[recipe.train.method].gate is not None:
        values += 2 * sum(map(sum, linear.values()))
    return 2 * (4 + 2 * size) * shape.hidden + size * values


def training_bytes(recipe: Recipe, shape: ModelShape, dtype: str, trainable: int, steps: int, length: int) -> int:
    """Peak memory of training in one process, within 20 % of the measurements (docs/decisions/0027).

    The sum of the weights; 16 A bytes for the trained parameters in float32 with gradients and AdamW's two moments;
    what the blocks save for each token of a full batch (with gradient checkpointing D values a block, and everything
    for one block at a time); the gradients of one block; and the logits of a tile of tokens, or of all if
    `holds_all_logits`, once in the model's dtype and three times in float32 for loss, softmax and gradient.

    Args:
        recipe: The recipe, with its method applied.
        shape: Shape of the base model.
        dtype: Dtype of its weights.
        trainable: A.
        steps: Number of trained steps.
        length: Tokens of the longest row.
    """
    settings = recipe.train
    size = BYTES[dtype]
    block = block_bytes(recipe, shape, dtype, steps)
    kept = shape.layers * shape.hidden * size + block if checkpoints(recipe) else shape.layers * block
    tokens = settings.per_device_train_batch_size * length
    fixed = RUNTIME_BYTES + weights_bytes(shape, dtype, settings.quantization) + 16 * trainable
    logits = tokens * (size + 12) if holds_all_logits(recipe) else min(tokens, TILE) * (size + 12)
    return round(fixed + tokens * (kept + block) + shape.vocab * logits)


def holds_all_logits(recipe: Recipe) -> bool:
    """Whether a setting makes the loss need the logits of all tokens at once (docs/decisions/0016)."""
    extra = recipe.train.model_extra or {}
    return any(extra.get(name) for name in ("bf16", "fp16", "torch_compile", "label_smoothing_factor"))


def checkpoints(recipe: Recipe) -> bool:
    """Whether the recipe uses gradient checkpointing."""
    return bool((recipe.train.model_extra or {}).get("gradient_checkpointing"))


def advice(
    recipe: Recipe, shape: ModelShape, dtype: str, trainable: int, steps: int, length: int, memory: int
) -> list[str]:
    """Settings to change, cumulatively and in order, until training fits; empty if it already does.

    Args:
        recipe: The recipe, with its method applied.
        shape: Shape of the base model.
        dtype: Dtype of its weights.
        trainable: Number of trained parameters.
        steps: Number of trained steps.
        length: Tokens of the longest row.
        memory: Available bytes.

    Returns:
        `key=value` settings; all that could help if even they do not suffice.
    """
    changes: list[str] = []

    def fits() -> bool:
        return training_bytes(recipe, shape, dtype, trainable, steps, length) <= memory

    batch = recipe.train.per_device_train_batch_size
    if not fits() and batch > 1:
        while recipe.train.per_device_train_batch_size > 1 and not fits():
            recipe = _with(recipe, per_device_train_batch_size=recipe.train.per_device_train_batch_size // 2)
        smaller = recipe.train.per_device_train_batch_size
        passes = -(-batch // smaller) * recipe.train.gradient_accumulation_steps
        changes += [f"train.per_device_train_batch_size={smaller}", f"train.gradient_accumulation_steps={passes}"]
    if not fits() and not checkpoints(recipe):
        recipe = _with(recipe, gradient_checkpointing=True)
        changes.append("train.gradient_checkpointing=true")
    if not fits() and length > 256:
        while length > 256 and not fits():
            length //= 2
        changes += ["train.packing=false"] if recipe.train.packing else []
        changes.append(f"train.max_length={length}")
    if not fits() and recipe.train.quantization == "none":
        changes.append("train.quantization=4bit")
    return changes


def _with(recipe: Recipe, **changes: object) -> Recipe:
    train = type(recipe.train).model_validate({**recipe.train.model_dump(), **changes})
    return recipe.model_copy(update={"train": train})


def device_memory(device: str) -> int:
    """Bytes of memory: the GPU's, or the machine's for a CPU."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    import psutil

    return int(psutil.virtual_memory().total)
