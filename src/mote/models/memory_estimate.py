"""The memory that training will need, from the model's shape, and what to change where it will not fit.

Legend: A trained parameters, D hidden size, F intermediate size.
"""

from mote.core.methods import METHODS
from mote.core.recipe import Recipe
from mote.models.shapes import ModelShape, count_parameters, experts_of, linear_shapes

TILE = 256  # tokens whose logits are in memory at once (mote.train.loss)
RUNTIME_BYTES = 0.6e9  # Python and its libraries
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_QUANTISED = {"8bit": 1.0, "4bit": 0.53}  # bytes of a quantised weight; 4 bits have a constant for 64 of them


def weights_bytes(shape: ModelShape, dtype: str, quantization: str = "none") -> float:
    """Weights of the base model; quantised are the linear layers of the blocks, not the embeddings."""
    linear = shape.layers * sum(inputs * outputs for inputs, outputs in linear_shapes(shape).values())
    rest = count_parameters(shape) - linear
    return rest * BYTES[dtype] + linear * _QUANTISED.get(quantization, BYTES[dtype])


def block_bytes(recipe: Recipe, shape: ModelShape, dtype: str, steps: int) -> int:
    """What a block keeps of a token for the backward pass.

    Each of the two norms keeps its input in float32, what it made of it and what it gave, D each; attention its
    queries, keys, values and output; the MLP 4 F; each linear layer the width of its experts. Of experts that a gate
    chooses, two a token, each layer keeps input and output of both as well.

    Args:
        recipe: With what its method fixes put in.
        shape: Of the base model.
        dtype: Of its weights.
        steps: How many steps are trained.
    """
    size, linear = BYTES[dtype], linear_shapes(shape)
    queries, keys = linear["self_attn.q_proj"][1], linear["self_attn.k_proj"][1]
    values = 2 * queries + 2 * keys + 4 * shape.intermediate
    values += recipe.experts.r * experts_of(recipe, steps) * len(linear)
    if METHODS[recipe.train.method].gate is not None:
        values += 2 * sum(map(sum, linear.values()))
    return 2 * (4 + 2 * size) * shape.hidden + size * values


def training_bytes(recipe: Recipe, shape: ModelShape, dtype: str, trainable: int, steps: int, length: int) -> int:
    """Peak memory of training in one process, within 20 % of what was measured (docs/decisions/0027).

    Weights; 16 A, what is trained in float32 with its gradient and AdamW's two moments; and for each token of a full
    batch what its blocks keep. With gradient checkpointing a block keeps D values, and only one at a time all of it. To
    this come the gradients of one block, and the logits of a tile of tokens, of all where `holds_all_logits`: in the
    model's dtype, and three times in float32 for the loss, its softmax, its gradient.

    Args:
        recipe: With what its method fixes put in.
        shape: Of the base model.
        dtype: Of its weights.
        trainable: A.
        steps: How many steps are trained.
        length: Tokens of the longest row.
    """
    settings, size, block = recipe.train, BYTES[dtype], block_bytes(recipe, shape, dtype, steps)
    kept = shape.layers * shape.hidden * size + block if checkpoints(recipe) else shape.layers * block
    tokens = settings.per_device_train_batch_size * length
    fixed = RUNTIME_BYTES + weights_bytes(shape, dtype, settings.quantization) + 16 * trainable
    logits = tokens * (size + 12) if holds_all_logits(recipe) else min(tokens, TILE) * (size + 12)
    return round(fixed + tokens * (kept + block) + shape.vocab * logits)


def holds_all_logits(recipe: Recipe) -> bool:
    """Whether a setting has the loss computed from the logits of all tokens (docs/decisions/0016)."""
    extra = recipe.train.model_extra or {}
    return any(extra.get(name) for name in ("bf16", "fp16", "torch_compile", "label_smoothing_factor"))


def checkpoints(recipe: Recipe) -> bool:
    """Whether blocks are computed again in the backward pass instead of being kept."""
    return bool((recipe.train.model_extra or {}).get("gradient_checkpointing"))


def advice(
    recipe: Recipe, shape: ModelShape, dtype: str, trainable: int, steps: int, length: int, memory: int
) -> list[str]:
    """Settings to turn, in this order and one on top of the other, until training fits; none where it does.

    Args:
        recipe: As in `training_bytes`, as are the next five.
        shape: Of the base model.
        dtype: Of its weights.
        trainable: Trained parameters.
        steps: How many steps are trained.
        length: Tokens of the longest row.
        memory: Bytes that there are.

    Returns:
        `key=value` settings; all there are where nothing helps.
    """
    turned: list[str] = []

    def fits() -> bool:
        return training_bytes(recipe, shape, dtype, trainable, steps, length) <= memory

    batch = recipe.train.per_device_train_batch_size
    if not fits() and batch > 1:
        while recipe.train.per_device_train_batch_size > 1 and not fits():
            recipe = _with(recipe, per_device_train_batch_size=recipe.train.per_device_train_batch_size // 2)
        smaller = recipe.train.per_device_train_batch_size
        passes = -(-batch // smaller) * recipe.train.gradient_accumulation_steps
        turned += [f"train.per_device_train_batch_size={smaller}", f"train.gradient_accumulation_steps={passes}"]
    if not fits() and not checkpoints(recipe):
        recipe = _with(recipe, gradient_checkpointing=True)
        turned.append("train.gradient_checkpointing=true")
    if not fits() and length > 256:
        while length > 256 and not fits():
            length //= 2
        turned += ["train.packing=false"] if recipe.train.packing else []
        turned.append(f"train.max_length={length}")
    if not fits() and recipe.train.quantization == "none":
        turned.append("train.quantization=4bit")
    return turned


def _with(recipe: Recipe, **changes: object) -> Recipe:
    train = type(recipe.train).model_validate({**recipe.train.model_dump(), **changes})
    return recipe.model_copy(update={"train": train})


def device_memory(device: str) -> int:
    """Bytes of the device's memory: a GPU's own, else the machine's."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    import psutil

    return int(psutil.virtual_memory().total)
