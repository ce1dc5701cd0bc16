"""The llama.cpp engine on base models of other architectures, whose steps are LoRAs."""

from pathlib import Path
from typing import Any

import pytest
from support.adapters import QUESTIONS
from support.exports import make_adapter
from support.vllm import make_base

import mote
from mote.inference.engines.llama_batch import LlamaBatcher

pytest.importorskip("xllamacpp", reason="llama.cpp (pip install 'mote-align[llamacpp]') is not installed")

WINDOWS = {"query_pre_attn_scalar": 32, "sliding_window": 8}
KINDS: dict[str, dict[str, Any]] = {
    "Qwen2": {},
    "Qwen3": {"tie_word_embeddings": False},
    "SmolLM3": {"num_hidden_layers": 4},
    "Phi3": {"tie_word_embeddings": False},
    "Gemma2": {"num_hidden_layers": 4, **WINDOWS},
    "Gemma3": {"num_hidden_layers": 7, **WINDOWS},
}


@pytest.mark.parametrize("kind", KINDS)
def test_answers_and_turns_equal_the_in_process_engines(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = make_base(tmp_path / "base", kind, **KINDS[kind])
    adapter = make_adapter(base, tmp_path / "adapter")
    reference = mote.load(str(base), adapter, device="cpu")
    model = mote.load(str(base), adapter, dtype="float32", engine="llamacpp")
    assert isinstance(model.batcher, LlamaBatcher) and len(model.batcher._files.loras) == 4
    for mode in ("full", "adaptive", "base"):
        expected = reference.answer(QUESTIONS, mode, max_step_tokens=8)
        assert [a.steps for a in model.answer(QUESTIONS, mode, max_step_tokens=8)] == [a.steps for a in expected]
    turns = [{"role": "user", "content": QUESTIONS[2]}, {"role": "assistant", "content": "safe answer"}]
    turns += [{"role": "user", "content": "and unsafe?"}]
    found = model.answer(turns, "full", max_step_tokens=8)
    assert found.steps == reference.answer(turns, "full", max_step_tokens=8).steps
    model.batcher.close()
