"""The per-step client of docs/vllm.md against a stock vLLM server with one LoRA per step."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from support.exports import make_adapter
from support.paths import ROOT
from support.vllm import make_base, vllm_server
from transformers import AutoTokenizer

from mote.core.records import Message
from mote.serve.export import export_engine_steps, export_steps
from mote.tokens.encode import encode_prompt, special_ids

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
pytestmark = pytest.mark.vllm
STEPS = ("analysis", "guidance", "response")
PAGE = ROOT / "docs" / "vllm.md"
BUDGET = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chained")
    make_adapter(make_base(folder / "base"), folder / "adapter")
    export_engine_steps(str(folder / "adapter"), folder / "steps")
    export_steps(str(folder / "adapter"), folder / "loras")
    return folder


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    steps = folder / "steps"
    loras = ("--enable-lora", "--max-lora-rank", "8", "--lora-modules", *(f"{s}={steps / s}" for s in STEPS))
    with vllm_server(steps / "base", folder / "server.log", *loras, "--max-num-seqs", "4") as url:
        yield url


@torch.no_grad()
def expected(folder: Path, question: str) -> list[int]:
    """Greedy ids from uncached PEFT forward passes with the LoRAs."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "steps" / "base")
    ids = encode_prompt(tokenizer, (Message(role="user", content=question),))
    for step in STEPS:
        model: Any = AutoPeftModelForCausalLM.from_pretrained(folder / "loras" / step).eval()
        start, end = tokenizer.convert_tokens_to_ids([f"<|{step}|>", f"<|/{step}|>"])
        never = list(special_ids(tokenizer) - {end})
        ids = [*ids, start]
        begun = len(ids)
        while ids[-1] != end and len(ids) < begun + BUDGET:
            scores = model(input_ids=torch.tensor([ids])).logits[0, -1]
            scores[never if len(ids) > begun else [*never, end]] = float("-inf")
            ids.append(int(scores.argmax()))
        ids += [] if ids[-1] == end else [end]
    return ids


def test_per_step_client_generates_what_the_loras_do(folder: Path, url: str) -> None:
    (client,) = (code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "for step in" in code)
    client = client.replace("http://127.0.0.1:8000", url).replace("exported/steps", str(folder / "steps"))
    client = client.replace("max_tokens=64", f"max_tokens={BUDGET}")
    assert url in client and str(folder) in client and f"={BUDGET}" in client
    there: dict[str, Any] = {}
    exec(client, there)
    question = re.search(r'content="(.*?)"', client)
    assert question and there["ids"] == expected(folder, question[1])
