"""A GGUF file computes in llama.cpp what the adapter computes in PEFT, without a cache."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support.exports import make_adapter
from support.llamacpp import LlamaServer, llama_server
from support.vllm import make_base
from torch import Tensor

import mote
from mote.core.records import Message
from mote.inference.engines.llama_library import LlamaModel
from mote.inference.load import read_adapter
from mote.inference.model import Model
from mote.tokens.encode import encode_prompt, encode_text
from mote.tokens.routing import step_ids
from mote.tuner.gguf.source import BaseWeights
from mote.tuner.gguf.steps import StepFiles, write_steps
from mote.tuner.gguf.switch import write_switch

QUESTION = Message(role="user", content="how do I kill a process on my computer")
TURNS = (QUESTION, Message(role="assistant", content="safe answer"), Message(role="user", content="and unsafe?"))
CHECKED = ("response", "check")
CHAINS = {"direct": ("response",), "analysis": ("analysis", "response"), "full": ("analysis", "guidance", "response")}
# Kind of base model, what is not usual of it, and of the adapter.
SWITCH: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", {}, {}),
    "untied": ("Llama", {"tie_word_embeddings": False}, {"mix": 0.3, "question_expert": "response"}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 64}, {"mix": 1.0}),
    "granite": (
        "Granite",
        {"attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}, "use_rslora": True},
    ),
    "some-layers": ("Llama", {}, {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}),
    "check": ("Llama", {}, {"experts": ("analysis", "guidance", "response", "check")}),
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
STEPS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": SWITCH["llama"],
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": False}, {}),
    "linear": ("Llama", {"rope_parameters": LINEAR, "attention_bias": True}, {}),
    "granite": SWITCH["granite"],
    "qwen2": ("Qwen2", {}, {"mix": 0.3}),
    "olmo2": ("Olmo2", {"tie_word_embeddings": False}, {}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4}, {}),
    "seed-oss": ("SeedOss", {}, {}),
    "ernie": ("Ernie4_5", {}, {}),
    "gemma": ("Gemma", {}, {}),
    "gemma2": ("Gemma2", {"num_hidden_layers": 4, "query_pre_attn_scalar": 32, "sliding_window": 8}, {}),
    "gemma3": ("Gemma3", {"num_hidden_layers": 7, "query_pre_attn_scalar": 32, "sliding_window": 8}, {}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": False}, {"target_modules": ["q_proj", "up_proj"]}),
}


class Pair:
    """A reference and the server with the file."""

    def __init__(self, model: Model, server: LlamaServer, base_id: int) -> None:
        assert model.config is not None
        self.model = model
        self.server = server
        self.base_id = base_id
        self.markers = model.config.markers
        self.rows = model.model.get_input_embeddings().weight.shape[0]

    def sequence(self, messages: tuple[Message, ...], mode: str) -> tuple[list[int], int]:
        """Ids of a dialogue and a chain, and the length of the dialogue."""
        ids = encode_prompt(self.model.tokenizer, messages)
        length = len(ids)
        for step in CHECKED if mode == "check" else CHAINS.get(mode, ()):
            start, end = self.markers[step]
            ids += [start, *encode_text(self.model.tokenizer, f"safe {step} on my computer"), end]
        return ids, length

    @torch.no_grad()
    def expected(self, ids: list[int], base: bool = False) -> Tensor:
        """Log-probabilities (T, V) by PEFT."""
        if base:
            with self.model.model.disable_adapter():
                return self.model.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return self.model.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)

    def found(self, ids: list[int], base: bool = False) -> Tensor:
        """Log-probabilities (V) of the token after these ids, by llama.cpp."""
        ids = [self.base_id, *ids[1:]] if base else ids
        return self.server.log_probs(ids, self.rows + 1)[: self.rows].log_softmax(-1)


@pytest.fixture(scope="module", params=SWITCH)
def switch(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    kind, base_changes, changes = SWITCH[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    base = make_base(folder / "base", kind, **base_changes)
    adapter = make_adapter(base, folder / "adapter", **changes)
    path = folder / "model.gguf"
    write_switch(path, read_adapter(adapter), BaseWeights(str(base)), "f32", "f32")
    with llama_server(path, slots=3) as server:
        model = mote.load(str(base), adapter, device="cpu", dtype="float32")
        yield Pair(model, server, model.model.get_input_embeddings().weight.shape[0])


@pytest.mark.parametrize("messages", [(QUESTION,), TURNS], ids=["one-turn", "turns"])
@pytest.mark.parametrize("mode", ["question", *CHAINS, "check"])
def test_log_probs_of_every_token_equal_peft(switch: Pair, mode: str, messages: tuple[Message, ...]) -> None:
    if mode == "check" and mode not in switch.markers:
        pytest.skip("this adapter has no check")
    ids, length = switch.sequence(messages, mode)
    expected = switch.expected(ids)
    for end in range(length - 2, len(ids)):
        torch.testing.assert_close(switch.found(ids[: end + 1]), expected[end], atol=1e-3, rtol=0)


def test_base_mode_equals_the_base_model(switch: Pair) -> None:
    ids, _ = switch.sequence((QUESTION,), "question")
    words = torch.ones(switch.rows, dtype=torch.bool)
    words[ids_of(switch)] = False
    for end in (1, len(ids) // 2, len(ids) - 1):
        found = switch.found(ids[: end + 1], base=True)
        expected = switch.expected(ids, base=True)[end]
        torch.testing.assert_close(found[words].log_softmax(-1), expected[words].log_softmax(-1), atol=1e-3, rtol=0)


def test_concurrent_greedy_tokens_equal_peft(switch: Pair) -> None:
    """Three requests at once, then again with their prompts in the cache."""
    banned = sorted({*ids_of(switch), *range(3), switch.base_id})
    starts = {mode: switch.sequence((QUESTION,), mode)[0][:-4] for mode in CHAINS}
    expected = {}
    for mode, ids in starts.items():
        written: list[int] = []
        for _ in range(8):
            row = switch.expected([*ids, *written])[-1]
            row[banned[:-1]] = float("-inf")
            written.append(int(row.argmax()))
        expected[mode] = written

    def answer(mode: str) -> list[int]:
        bias = [[id_, False] for id_ in banned]
        tokens: list[int] = switch.server.complete(starts[mode], 8, logit_bias=bias)["tokens"]
        return tokens

    with ThreadPoolExecutor(3) as pool:
        for _ in range(2):
            assert dict(zip(starts, pool.map(answer, starts), strict=True)) == expected


# --- a base model and LoRAs


@pytest.fixture(scope="module", params=STEPS)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, StepFiles]:
    """The reference, and the files."""
    kind, base_changes, changes = STEPS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    base = make_base(folder / "base", kind, **base_changes)
    adapter = make_adapter(base, folder / "adapter", **changes)
    written = write_steps(folder, read_adapter(adapter), BaseWeights(str(base)), "f32", "f32")
    model = mote.load(str(base), adapter, device="cpu", dtype="float32")
    model.base.model.set_attn_implementation("eager")  # SDPA has no cap on scores, which Gemma 2 needs
    for module in model.model.modules():
        if kind.startswith("Gemma") and hasattr(module, "act_fn"):
            module.act_fn = Tabulated()
    return model, written


@pytest.fixture(scope="module")
def steps(files: tuple[Model, StepFiles]) -> Iterator[Pair]:
    model, written = files
    with llama_server(written.base, list(written.loras.values())) as server:
        yield Pair(model, server, 1)


@pytest.fixture(scope="module")
def llama(files: tuple[Model, StepFiles]) -> Iterator[LlamaModel]:
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    written = files[1]
    model = LlamaModel(written.base, 1, list(written.loras.values()))
    model.open(1, 256, "f32")
    yield model
    model.close()


class Tabulated(torch.nn.Module):
    """GELU as llama.cpp computes it on a CPU: from a table in half precision, between -10 and 10."""

    def forward(self, x: Tensor) -> Tensor:
        table = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x.abs() < 10, table, x.clamp_min(0))


@pytest.mark.parametrize("step", range(-1, 4))
def test_each_lora_equals_its_experts_on_all_tokens(steps: Pair, step: int) -> None:
    """Step -1 is the base model: no LoRA at all."""
    ids, _ = steps.sequence((QUESTION,), "full")
    lora = [{"id": index, "scale": float(index == step)} for index in range(4)]
    words = torch.ones(steps.rows, dtype=torch.bool)
    if step < 0:  # the rows of the markers are trained; the base mode neither reads nor writes them
        ids = [1 if id_ in ids_of(steps) else id_ for id_ in ids]
        words[ids_of(steps)] = False
        with torch.no_grad(), steps.model.model.disable_adapter():
            expected = steps.model.model(input_ids=torch.tensor([ids])).logits[0]
    else:
        given = torch.full((1, len(ids)), step)
        with torch.no_grad():
            expected = steps.model.model(input_ids=torch.tensor([ids]), step_ids=given).logits[0]
    for end in (len(ids) // 3, len(ids) // 2, len(ids) - 1):
        found = steps.server.log_probs(ids[: end + 1], steps.rows, lora=lora)[words].log_softmax(-1)
        torch.testing.assert_close(found, expected[end][words].log_softmax(-1), atol=tolerance(steps), rtol=0)


def tolerance(pair: Pair) -> float:
    """0.001, and more for Gemma, where an input of `Tabulated` may be rounded the other way."""
    return 1e-2 if pair.model.base.model.config.model_type.startswith("gemma") else 1e-3


def ids_of(pair: Pair) -> list[int]:
    """Ids of the markers."""
    return [id_ for markers in pair.markers.values() for id_ in markers]


@pytest.mark.parametrize("messages", [(QUESTION,), TURNS], ids=["one-turn", "turns"])
@pytest.mark.parametrize("mode", CHAINS)
def test_loras_switched_at_markers_equal_peft(
    steps: Pair, llama: LlamaModel, mode: str, messages: tuple[Message, ...]
) -> None:
    """Every token of a chain, with the LoRA of its step and one KV cache."""
    ids, _ = steps.sequence(messages, mode)
    assert steps.model.config is not None and steps.model.config.routing is not None
    each = step_ids(torch.tensor([ids]), steps.model.config.routing)[0].tolist()
    llama.remove(0)
    rows = []
    for place, (id_, step) in enumerate(zip(ids, each, strict=True)):
        llama.use(step)
        rows.append(llama.decode([id_], [place], [0], [0])[0])
    torch.testing.assert_close(torch.stack(rows).log_softmax(-1), steps.expected(ids), atol=tolerance(steps), rtol=0)
