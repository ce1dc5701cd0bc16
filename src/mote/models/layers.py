"""Which earlier tokens each layer of a base model can see, from its configuration.

Knows transformers' names for kinds of layers and nothing of steps. Models whose layers differ take a dict of masks, one
for each of these names; all others take one mask.
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from mote.core.errors import UserError

Kind = Literal["full", "sliding", "chunked", "recurrent", "none", "other"]
FULL = "full_attention"
_KINDS: dict[str, Kind] = {
    FULL: "full",
    "attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
    "conv": "recurrent",
    "hybrid": "recurrent",
    "hybrid_sliding": "recurrent",
    "linear_attention": "recurrent",
    "mamba": "recurrent",
    "recurrent": "recurrent",
    "mlp": "none",
    "moe": "none",
}


@dataclass(frozen=True)
class Layer:
    """What a layer sees.

    Attributes:
        name: transformers' name of its kind, the key of its mask in a dict of masks.
        kind: `full`, `sliding` and `chunked` attention; `recurrent` layers, which read a state (state-space and
            convolution layers, linear attention, and attention beside one of them); `none` for layers that see their
            own token only; `other` where it does not follow from the name.
        reach: Tokens of the window or of a chunk; None for other kinds.
    """

    name: str
    kind: Kind
    reach: int | None = None

    def within(self, query_position: Tensor, key_position: Tensor) -> Tensor:
        """Whether an earlier key is in the query's window or chunk, by their positions; not for other kinds."""
        assert self.reach is not None
        if self.kind == "chunked":
            return key_position // self.reach == query_position // self.reach
        return key_position > query_position - self.reach


def layers_of(config: Any) -> tuple[Layer, ...]:
    """The layers of a base model, from its configuration (of the text model, if there are several).

    Raises:
        UserError: Layers of one kind have windows or chunks of their own.
    """
    config = config.get_text_config(decoder=True)
    if own := {"sliding_window", "attention_chunk_size"} & set(getattr(config, "per_layer_attributes", None) or ()):
        raise UserError(
            f"model: {config.model_type} has layers with a {min(own)} of their own (per_layer_config), and masks are "
            "made for each kind of layer; use another base model"
        )
    window = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    names = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if names is None and config.model_type in ("rwkv", "xlstm"):
        names = ["recurrent"] * config.num_hidden_layers
    if names is None:  # all alike
        name = "sliding_attention" if window is not None else "chunked_attention" if chunk is not None else FULL
        names = [name] * config.num_hidden_layers
    layers = []
    for name in names:
        kind = _KINDS.get(name, "other")
        reach = window if kind == "sliding" else chunk if kind == "chunked" else None
        if kind in ("sliding", "chunked") and reach is None:
            kind = "full"
        layers.append(Layer(name, kind, reach))
    return tuple(layers)


def stateful_layers(config: Any) -> list[str]:
    """Names of the kinds of layers that keep a state, which carries over between documents and ignores masks."""
    return sorted({layer.name for layer in layers_of(config) if layer.kind == "recurrent"})


def indexed_scaling(config: Any) -> int | None:
    """From how many tokens on a row's attention depends on the index of each token in the row, not on its position.

    Llama 4 scales the queries of its layers without rotary embeddings so, from `floor_scale` tokens on. None for
    all other models.
    """
    config = config.get_text_config(decoder=True)
    rotary = getattr(config, "no_rope_layers", None)  # 0 marks the layers without
    if config.model_type != "llama4_text" or not config.attn_temperature_tuning or all(rotary or ()):
        return None
    return int(config.floor_scale)


def takes_block_mask(config: Any) -> bool:
    """Whether FlexAttention sees the mask it is given: Doge adds a bias to it and then drops the mask."""
    return bool(config.get_text_config(decoder=True).model_type != "doge")


def masked_kinds(config: Any) -> tuple[Layer, ...]:
    """The different kinds among the layers with attention; a model takes a mask for each, or one if there is one."""
    return tuple(dict.fromkeys(layer for layer in layers_of(config) if layer.kind in ("full", "sliding", "chunked")))


def kv_layers(config: Any) -> tuple[int, ...]:
    """For each layer the one whose keys and values it reads: its own, or an earlier one's (Gemma 3n and 4)."""
    layers = layers_of(config)
    shared = getattr(config.get_text_config(decoder=True), "num_kv_shared_layers", None) or 0
    first = len(layers) - shared
    last = {layer.name: index for index, layer in enumerate(layers[:first])}
    return tuple(index if index < first else last[layer.name] for index, layer in enumerate(layers))
