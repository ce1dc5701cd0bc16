"""vLLM plugin: `vllm serve` on a folder that `mote export --format vllm` wrote.

vLLM calls `register` in each of its processes through the entry point `vllm.general_plugins`.
"""

_ARCHITECTURES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3")


def register() -> None:
    """Register the model classes, their config checks, the renderer and the reasoning parser with vLLM."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.reasoning import ReasoningParserManager
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    from mote.serve.vllm.engine_config import StepEngineConfig
    from mote.serve.vllm.parser import use_step_parser

    for name in _ARCHITECTURES:
        architecture = f"Mote{name}ForCausalLM"
        ModelRegistry.register_model(architecture, f"mote.serve.vllm.models:{architecture}")
        MODELS_CONFIG_MAP[architecture] = StepEngineConfig
    TokenizerRegistry.tokenizers["mote"] = ("vllm.tokenizers.hf", "CachedHfTokenizer")
    RENDERER_REGISTRY.renderers["mote"] = ("mote.serve.vllm.renderer", "StepRenderer")
    ReasoningParserManager.register_lazy_module("mote", "mote.serve.vllm.parser", "StepReasoning")
    use_step_parser()
