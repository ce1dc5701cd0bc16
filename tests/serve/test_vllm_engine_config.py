"""vLLM settings that are refused or changed before anything is loaded."""

from pathlib import Path
from typing import Any

import pytest
from support.vllm import make_served

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
pytestmark = pytest.mark.vllm

from vllm import EngineArgs  # noqa: E402

from mote.serve.vllm.engine_config import GRAMMAR  # noqa: E402


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_served(tmp_path_factory.mktemp("settings"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"enable_lora": True}, "mote: --enable-lora is not supported with step experts; serve the other adapter"),
        ({"enable_prompt_embeds": True}, "mote: --enable-prompt-embeds is not supported"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
            "mote: --speculative-config is not supported with step experts; vLLM drops the step grammar with it",
        ),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "mote: --kv-transfer-config is not supported",
        ),
        (
            {"pipeline_parallel_size": 2},
            "mote: --pipeline-parallel-size is not supported .*; use --tensor-parallel-size",
        ),
        ({"reasoning_parser": "qwen3"}, "mote: --reasoning-parser qwen3 is not supported .*; leave it out"),
        ({"tokenizer_mode": "hf"}, "mote: --tokenizer-mode hf: leave it out"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unsupported_settings_are_refused(served: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineArgs(str(served / "out"), dtype="float32", **given).create_engine_config()


def test_renderer_grammar_and_parser_are_set(served: Path) -> None:
    config = EngineArgs(str(served / "out"), dtype="float32").create_engine_config()
    assert config.model_config.tokenizer_mode == "mote" and config.model_config.logits_processors == [GRAMMAR]
    assert config.structured_outputs_config.reasoning_parser == "mote"
    assert config.scheduler_config.disable_hybrid_kv_cache_manager


def test_other_models_are_unaffected(served: Path) -> None:
    config = EngineArgs(str(served / "base"), dtype="float32").create_engine_config()
    assert config.model_config.tokenizer_mode == "auto" and not config.model_config.logits_processors
    assert not config.structured_outputs_config.reasoning_parser
