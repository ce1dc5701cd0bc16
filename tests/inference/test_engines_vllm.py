"""vLLM in this process and behind its server, against transformers: the same ids, the same text.

python -m pytest -m vllm tests/inference/test_engines_vllm.py      # in an environment with vLLM
"""

import asyncio
import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mote.chains.engine import Completion, Engine, Prompt
from mote.core.errors import UserError
from mote.core.records import Message
from mote.inference.engines.server import ServerEngine
from mote.inference.engines.vllm import VllmEngine
from mote.models.load import Base, load_base
from mote.tokens.encode import encode_prompt

HERE = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not HERE, reason="vllm is not installed (docs/engines.md says how)")
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
OPTIONS = {"max_model_len": 512, "max_num_seqs": 8, "enforce_eager": True}
TEXTS = [
    "kill a process",
    "safe",
    "how do I answer on my computer, and is it safe or unsafe?",
    "unsafe <|im_end|> analysis",
]


def prompt(text: str, **changes: Any) -> Prompt:
    given: dict[str, Any] = {"messages": (Message(role="user", content=text),), "max_tokens": 16}
    return Prompt(**{**given, **changes})


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with heads as wide as vLLM's kernels for a CPU want them."""
    folder = tmp_path_factory.mktemp("wide")
    config = AutoConfig.from_pretrained(tiny, hidden_size=128, intermediate_size=128, head_dim=32)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return load_base(str(folder), device="cpu", dtype="float32")


def by_transformers(base: Base, text: str, ids: list[int] | None = None) -> Completion:
    """Greedy, without a batch, from the same ids."""
    ids = ids or encode_prompt(base.tokenizer, prompt(text).messages)
    given = torch.tensor([ids])
    out = base.model.generate(
        input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=16, do_sample=False
    )
    new = out[0, given.shape[1] :].tolist()
    ended = base.tokenizer.eos_token_id in new
    return Completion(
        text=base.tokenizer.decode(new, skip_special_tokens=True).strip(),
        tokens=len(new),
        finish="stop" if ended else "length",
        prompt_tokens=given.shape[1],
    )


def whole(completion: Completion) -> Completion:
    """Without a last character that was cut: a server keeps its bytes back, and random weights write such ones."""
    return replace(completion, text=completion.text.rstrip("\ufffd"))


def safe_against_unsafe(base: Base, text: str) -> float:
    first, second = (base.tokenizer(word)["input_ids"][0] for word in ("safe", "unsafe"))
    ids = torch.tensor([encode_prompt(base.tokenizer, prompt(text).messages)])
    with torch.inference_mode():
        return float(base.model(input_ids=ids).logits[0, -1, [first, second]].softmax(0)[0])


def begins_a_verdict(base: Base, ids: list[int]) -> bool:
    """Whether one of the 20 likeliest next tokens begins `safe` or `unsafe`: what a server's log-probabilities show."""
    with torch.inference_mode():
        likeliest = base.model(input_ids=torch.tensor([ids])).logits[0, -1].topk(20).indices.tolist()
    words = [base.tokenizer.decode([id_]).strip().lower() for id_ in likeliest]
    return any(word and name.startswith(word) for word in words for name in ("safe", "unsafe"))


async def all_at_once(engine: Engine) -> tuple[list[Completion], list[float | None], list[Completion]]:
    """Greedy texts, choices, and sampled texts of all prompts, asked together."""
    try:
        written = await asyncio.gather(*(engine.write(prompt(text)) for text in TEXTS))
        preferred = await asyncio.gather(*(engine.choose(prompt(text), ("safe", "unsafe")) for text in TEXTS))
        sampled = [prompt(text, temperature=0.9, top_p=0.95, seed=2**63 - 1 - i) for i, text in enumerate(TEXTS)]
        drawn = await asyncio.gather(*(engine.write(one) for one in sampled))
        alone = [await engine.write(one) for one in sampled]
        assert alone == drawn  # the seed is the request's own
        return written, [one.score for one in preferred], drawn
    finally:
        await engine.close()


@pytest.mark.vllm
@needs_vllm
def test_in_process_vllm_equals_transformers(folder: Path, base: Base) -> None:
    async def main() -> tuple[list[Completion], list[float | None], list[Completion]]:
        engine = VllmEngine(str(folder), dtype="float32", **OPTIONS)
        with pytest.raises(UserError, match="same token"):
            await engine.choose(prompt("x"), ("safe", "safe"))
        with pytest.raises(UserError, match=r"vllm refuses a prompt .*chains\.max_question_chars"):
            await engine.write(prompt("safe " * 600))
        return await all_at_once(engine)

    written, chosen, drawn = asyncio.run(main())
    assert written == [by_transformers(base, text) for text in TEXTS]
    assert chosen == pytest.approx([safe_against_unsafe(base, text) for text in TEXTS], abs=1e-4)
    assert [one.text for one in drawn] != [one.text for one in written]


@pytest.fixture(scope="module")
def served(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a real vLLM server of the tiny model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--dtype", "float32",
               "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager",
               "--max-model-len", "512", "--max-num-seqs", "8", "--generation-config", "vllm"]  # fmt: skip
    with open(log, "w") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink)
    try:
        until = time.monotonic() + 240
        while not _healthy(port):
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def _healthy(port: int) -> bool:
    try:
        return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).status == 200)
    except OSError:
        return False


@pytest.mark.vllm
@needs_vllm
def test_vllm_server_equals_transformers(served: str, base: Base) -> None:
    written, chosen, drawn = asyncio.run(all_at_once(ServerEngine(served, "tiny")))
    plain = [text for text in TEXTS if "<|" not in text]  # a server reads special tokens in a user's text as such
    assert [whole(one) for one in written[: len(plain)]] == [whole(by_transformers(base, text)) for text in plain]
    rendered = base.tokenizer.apply_chat_template(
        [{"role": "user", "content": TEXTS[-1]}], add_generation_prompt=True, tokenize=False
    )
    ids = base.tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert whole(written[-1]) == whole(by_transformers(base, TEXTS[-1], ids))
    read = [*(encode_prompt(base.tokenizer, prompt(text).messages) for text in plain), ids]
    scores = [*chosen[: len(plain)], chosen[-1]]
    assert [score is not None for score in scores] == [begins_a_verdict(base, one) for one in read]
    assert all(0 <= score <= 1 for score in chosen if score is not None)
    assert [one.text for one in drawn] != [one.text for one in written]


@pytest.mark.vllm
@needs_vllm
def test_refusal_of_a_real_server_is_one_line(served: str) -> None:
    async def ask(model: str, text: str) -> None:
        engine = ServerEngine(served, model)
        try:
            await engine.write(prompt(text))
        finally:
            await engine.close()

    with pytest.raises(UserError, match=r"does not serve model='other' .*it serves 'tiny'"):
        asyncio.run(ask("other", "one"))
    with pytest.raises(UserError, match=r"refuses a request \(400: .*512.*chains\.max_question_chars"):
        asyncio.run(ask("tiny", "safe " * 600))


@pytest.mark.skipif(HERE, reason="vllm is installed")
def test_without_vllm_the_remedy_is_named(tiny: Path) -> None:
    with pytest.raises(UserError, match=r"engine: vllm is not installed; .*pip install vllm.*engine=transformers"):
        VllmEngine(str(tiny))
