"""vLLM's model classes with step experts: its own classes plus one mixin."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.models.gemma2 import Gemma2ForCausalLM
from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from mote.serve.vllm import experts, merged
from mote.serve.vllm.folder_config import ServedConfig
from mote.serve.vllm.step_cache import StepCache


class StepExperts:
    """Mixin: routes a batch before the forward pass, and loads the experts along with the weights."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config = vllm_config.model_config.hf_config
        served = ServedConfig.model_validate(config.mote)
        dtype = vllm_config.model_config.dtype
        device = vllm_config.device_config.device
        base_model = [0.0] * len(served.gates[0])  # no expert reads tokens of base-model requests
        table = torch.tensor([*served.gates, base_model], dtype=dtype, device=device)
        self.mote_table = table.repeat_interleave(served.rank, dim=1)
        self.mote_config = vllm_config
        self.mote_layers = vllm_config.compilation_config.static_forward_context
        name = f"{prefix}mote_steps.{config.num_hidden_layers}"  # vLLM parses a unique layer number from it
        self.mote_steps = StepCache(served, config.vocab_size, name)

    def forward(
        self, input_ids: Tensor, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Any = None
    ) -> Any:
        """Hidden states of a batch; sets the expert weights first, outside any compiled graph."""
        if inputs_embeds is not None:
            raise RuntimeError("mote: inputs_embeds is not supported; step ids are derived from token ids")
        steps = self.mote_steps(input_ids)
        if steps is not None:
            self.mote_expert_weights.set(steps)
        return super().forward(input_ids, positions, intermediate_tensors)  # type: ignore[misc]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the base model's weights as its class does, and the experts found among them."""
        found: dict[str, Tensor] = {}

        def base_weights() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                if ".mote_" in name:
                    found[name] = tensor
                else:
                    yield name, tensor

        loaded: set[str] = super().load_weights(base_weights())  # type: ignore[misc]
        modules = dict(self.named_modules())  # type: ignore[attr-defined]
        pairs: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
        for name in (name.removesuffix(".mote_A") for name in found if name.endswith(".mote_A")):
            layer, index = packed_index(name, self.packed_modules_mapping)  # type: ignore[attr-defined]
            pairs.setdefault(layer, {})[index] = found[f"{name}.mote_A"], found[f"{name}.mote_B"]
        unknown = sorted(name for name in pairs if not isinstance(modules.get(name), LinearBase))
        if unknown:
            raise ValueError(f"mote: {type(self).__name__} has no linear layers {unknown} to put experts on")
        expert_weights = expert_weights_for(self.mote_config, self.mote_table)
        for name, of_layer in pairs.items():
            if isinstance(expert_weights, merged.MergedExpertWeights):
                merged.add_experts(modules[name], name, of_layer, expert_weights, self.mote_layers)
            else:
                experts.add_experts(modules[name], of_layer, expert_weights)
            own = modules[name].named_parameters(name, recurse=True)
            loaded |= {parameter for parameter, _ in own if ".mote_" in parameter}
        self.mote_expert_weights = expert_weights
        return loaded


def expert_weights_for(vllm_config: Any, table: Tensor) -> experts.ExpertWeights | merged.MergedExpertWeights:
    """The implementation to use: merged if the weights allow it, else the general one.

    Args:
        vllm_config: vLLM's full configuration.
        table: Expert weights of the question, of each step and of base-model requests (1 + S + 1, E*R).
    """
    if mergeable(vllm_config):
        return merged.MergedExpertWeights(table)
    return experts.ExpertWeights(table, vllm_config.scheduler_config.max_num_batched_tokens)


def mergeable(vllm_config: Any) -> bool:
    """Whether the question's experts may be merged into the weights: only in float32, else rounding changes them."""
    model = vllm_config.model_config
    device = vllm_config.device_config.device
    return device.type == "cpu" and model.dtype == torch.float32 and vllm_config.quant_config is None


def packed_index(name: str, packed: dict[str, list[str]]) -> tuple[str, int]:
    """vLLM's layer that a projection is packed into, and the projection's index there."""
    parent, _, leaf = name.rpartition(".")
    for layer, projections in packed.items():
        if leaf in projections:
            return f"{parent}.{layer}", projections.index(leaf)
    return name, 0


class MoteLlamaForCausalLM(StepExperts, LlamaForCausalLM):
    """Llama with step experts."""


class MoteMistralForCausalLM(StepExperts, MistralForCausalLM):
    """Mistral with step experts."""


class MoteQwen2ForCausalLM(StepExperts, Qwen2ForCausalLM):
    """Qwen 2 with step experts."""


class MoteQwen3ForCausalLM(StepExperts, Qwen3ForCausalLM):
    """Qwen 3 with step experts."""


class MoteGemma2ForCausalLM(StepExperts, Gemma2ForCausalLM):
    """Gemma 2 with step experts."""


class MoteGemma3ForCausalLM(StepExperts, Gemma3ForCausalLM):
    """Gemma 3 with step experts."""
