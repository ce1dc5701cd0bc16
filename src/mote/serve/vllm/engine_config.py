"""vLLM settings that a served model changes, and those it refuses by name."""

from typing import Any, ClassVar

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from mote.serve.vllm.folder_config import ServedConfig

GRAMMAR = "mote.serve.vllm.grammar:StepGrammarProcessor"


class StepEngineConfig(VerifyAndUpdateConfig):
    """Hook that vLLM calls for the architectures of `mote.serve.vllm`, in its first process."""

    served: ClassVar[ServedConfig | None] = None  # the served model's config, to validate requests

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Use the guarded renderer, and the step grammar for every answer."""
        StepEngineConfig.served = ServedConfig.model_validate(model_config.hf_config.mote)
        if model_config.tokenizer_mode not in ("auto", "mote"):
            raise ValueError(f"mote: --tokenizer-mode {model_config.tokenizer_mode}: leave it out")
        model_config.tokenizer_mode = "mote"
        model_config.logits_processors = [*(model_config.logits_processors or []), GRAMMAR]

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse unsupported settings; put all layers in one KV cache group; use the step parser."""
        for setting, given, remedy in unsupported(vllm_config):
            if given:
                raise ValueError(f"mote: {setting} is not supported with step experts; {remedy}")
        # Sliding-window layers then keep blocks for all tokens, as the layer that stores the steps does.
        vllm_config.scheduler_config.disable_hybrid_kv_cache_manager = True
        vllm_config.structured_outputs_config.reasoning_parser = "mote"


def unsupported(vllm_config: Any) -> list[tuple[str, bool, str]]:
    """Unsupported settings: name, whether it is set, and the remedy."""
    parallel = vllm_config.parallel_config
    model = vllm_config.model_config
    parser = vllm_config.structured_outputs_config.reasoning_parser
    return [
        ("--kv-transfer-config", vllm_config.kv_transfer_config is not None, "leave it out"),
        ("--enable-lora", vllm_config.lora_config is not None, "serve the other adapter by itself"),
        ("--speculative-config", vllm_config.speculative_config is not None, "vLLM drops the step grammar with it"),
        ("--enable-dbo", parallel.use_ubatching, "a batch is routed as a whole"),
        ("--pipeline-parallel-size", parallel.pipeline_parallel_size > 1, "use --tensor-parallel-size"),
        ("--decode-context-parallel-size", parallel.decode_context_parallel_size > 1, "use --tensor-parallel-size"),
        ("--prefill-context-parallel-size", parallel.prefill_context_parallel_size > 1, "use --tensor-parallel-size"),
        ("--enable-prompt-embeds", model.enable_prompt_embeds, "step ids are derived from token ids"),
        ("VLLM_USE_V2_MODEL_RUNNER=1", vllm_config.use_v2_model_runner, "set it to 0"),
        (
            f"--reasoning-parser {parser}",
            parser not in ("", "mote"),
            "leave it out; answers are parsed by mote's parser",
        ),
    ]
