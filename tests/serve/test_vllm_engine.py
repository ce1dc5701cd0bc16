"""vLLM with step experts generates the uncached reference's tokens."""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.vllm import load_served, make_served, reference

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
pytestmark = pytest.mark.vllm

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, so that tests can inspect it
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch  # noqa: E402
from vllm import EngineArgs, LLMEngine, SamplingParams  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402

from mote.core.records import Message  # noqa: E402
from mote.core.scheme import BASE  # noqa: E402
from mote.inference.model import Model  # noqa: E402
from mote.serve.vllm import experts, merged, models  # noqa: E402
from mote.serve.vllm import step_cache as steps  # noqa: E402
from mote.serve.vllm.chunk_steps import chunk_steps  # noqa: E402
from mote.serve.vllm.renderer import StepRenderer  # noqa: E402
from mote.tokens.encode import encode_prompt  # noqa: E402

BUDGET = 8
MODES = ("adaptive", "direct", "analysis", "full", BASE)
WORDS = ["how", "do", "I", "kill", "a", "process", "on", "my", "computer", "safe", "unsafe", "analysis", "answer"]
USUAL: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "block_size": 32,
                         "distributed_executor_backend": "uni"}  # fmt: skip
Asked = tuple[list[int], str]  # ids of a prompt, mode

TIGHT = {"max_num_seqs": 16, "max_num_batched_tokens": 24}  # forces chunked prefill beside decoding requests
WIDE = {"max_num_seqs": 64, "max_num_batched_tokens": 96}


def prompts(model: Model, count: int, shared: int = 12) -> list[Asked]:
    """Dialogues of one and three turns with a shared prefix, in all modes."""
    made = []
    for number, mode in zip(range(count), itertools.cycle(MODES), strict=False):
        words = " ".join(WORDS[(number * 5 + i) % len(WORDS)] for i in range(3 + number % 23))
        turns = [Message(role="system", content=" ".join(WORDS * shared)[: 20 * shared])]
        if number % 3 == 0:
            turns += [Message(role="user", content=words[::-1]), Message(role="assistant", content=words[:9])]
        made.append((encode_prompt(model.tokenizer, (*turns, Message(role="user", content=words))), mode))
    return made


def sampling(mode: str, budget: int = BUDGET) -> SamplingParams:
    extra = {} if mode == BASE else {"mode": mode, "max_step_tokens": budget}
    return SamplingParams(temperature=0, max_tokens=budget if mode == BASE else 200, extra_args=extra)


def as_prompt(asked: Asked, twin: int) -> dict[str, list[int]]:
    ids, mode = asked
    return {"prompt_token_ids": [twin, *ids[1:]] if mode == BASE else list(ids)}


class Engine:
    """vLLM in this process; counts scheduled, preempted and cached tokens."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.engine = LLMEngine.from_engine_args(EngineArgs(str(folder / "out"), **{**USUAL, **settings}))
        self.twin = self.engine.model_config.hf_config.mote["opening"][1]
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.scheduled = 0
        self.preempted = 0
        self.cached = 0
        schedule = self.scheduler.schedule
        preempt = self.scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> Any:
            planned = schedule(*args, **kwargs)
            self.scheduled += planned.total_num_scheduled_tokens
            return planned

        def preempted(*args: Any, **kwargs: Any) -> Any:
            self.preempted += 1
            return preempt(*args, **kwargs)

        self.scheduler.schedule = counted
        self.scheduler._preempt_request = preempted

    def answers(self, asked: Sequence[Asked], abort: Sequence[int] = ()) -> dict[int, list[int]]:
        """Ids of each answer to concurrent requests; those in `abort` are aborted after some tokens."""
        for number, request in enumerate(asked):
            self.engine.add_request(str(number), as_prompt(request, self.twin), sampling(request[1]))
        written: dict[int, list[int]] = {}
        for turn in itertools.count():
            if not self.engine.has_unfinished_requests():
                break
            for output in self.engine.step():
                if output.finished:
                    written[int(output.request_id)] = list(output.outputs[0].token_ids)
                    self.cached += output.num_cached_tokens or 0
            if turn and turn % 5 == 0 and abort:
                self.engine.abort_request([str(number) for number in abort[:2]])
                abort = abort[2:]
        return written

    def close(self) -> None:
        self.engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_served(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(served: Path) -> Model:
    return load_served(served)


@pytest.fixture(scope="module")
def asked(model: Model) -> list[Asked]:
    return prompts(model, 64)


@pytest.fixture(scope="module")
def expected(model: Model, asked: list[Asked]) -> dict[int, list[int]]:
    return {number: reference(model, *request, BUDGET) for number, request in enumerate(asked)}


@pytest.fixture(scope="module", params=[TIGHT, WIDE], ids=["tight", "wide"])
def engine(request: pytest.FixtureRequest, served: Path) -> Iterator[Engine]:
    made = Engine(served, **request.param)
    yield made
    made.close()


def equal(written: dict[int, list[int]], expected: dict[int, list[int]]) -> list[int]:
    return [number for number, ids in written.items() if ids == expected[number]]


def test_64_requests_in_all_modes_equal_the_reference(
    engine: Engine, asked: list[Asked], expected: dict[int, list[int]]
) -> None:
    written = engine.answers(asked)
    assert len(equal(written, expected)) == len(asked) == len(written)
    assert len({tuple(ids) for ids in written.values()}) > 32  # the answers are diverse


def test_cached_prefixes_keep_their_steps(
    engine: Engine, asked: list[Asked], expected: dict[int, list[int]], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = engine.cached
    assert len(equal(engine.answers(asked), expected)) == len(asked)
    assert engine.cached > before + 32 * len(asked)
    monkeypatch.delattr(StepRenderer, "validate_token_ids")  # it would refuse markers in a prompt
    # The next prompt starts with the model's whole output, markers included.
    turn = model.tokenizer("<|im_end|>\n<|im_start|>user\nsafe<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    second = [([*ids, *expected[n], *turn], mode) for n, (ids, mode) in enumerate(asked[:20]) if mode != BASE]
    again = {number: reference(model, *request, BUDGET) for number, request in enumerate(second)}
    assert len(equal(engine.answers(second), again)) == len(second)


def test_aborted_requests_change_no_other(engine: Engine, asked: list[Asked], expected: dict[int, list[int]]) -> None:
    written = engine.answers(asked, abort=range(0, 64, 3))
    assert 32 < len(written) < 64 and len(equal(written, expected)) == len(written)


def test_without_the_step_before_a_chunk_answers_differ(
    engine: Engine, asked: list[Asked], expected: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(ids: torch.Tensor, first: torch.Tensor, before: torch.Tensor, events: torch.Tensor) -> torch.Tensor:
        return chunk_steps(ids, first, torch.zeros_like(before), events)

    monkeypatch.setattr(steps, "chunk_steps", forgetful)
    engine.engine.reset_prefix_cache()
    written = engine.answers(asked[:20])
    engine.engine.reset_prefix_cache()
    routed = {number: ids for number, ids in written.items() if asked[number][1] != BASE}
    assert len(equal(routed, expected)) < len(routed) / 4  # equal by chance


def test_preempted_requests_equal_the_reference(
    served: Path, asked: list[Asked], expected: dict[int, list[int]]
) -> None:
    engine = Engine(served, **TIGHT, num_gpu_blocks_override=16, max_model_len=384)
    written = engine.answers(asked)
    engine.close()
    assert engine.preempted > 0 and len(equal(written, expected)) == len(asked)


def test_each_token_is_computed_once(served: Path, asked: list[Asked], expected: dict[int, list[int]]) -> None:
    engine = Engine(served, **WIDE, enable_prefix_caching=False)
    written = engine.answers(asked)
    engine.close()
    assert len(equal(written, expected)) == len(asked) and engine.preempted == 0
    # Every prompt token and every generated one but the last is computed once, also where the step changes.
    assert engine.scheduled == sum(len(ids) + len(written[number]) - 1 for number, (ids, _) in enumerate(asked))


KINDS: dict[str, dict[str, Any]] = {
    "Mistral": {"tie_word_embeddings": False, "sliding_window": None},
    "Qwen2": {"tie_word_embeddings": False},
    "Qwen3": {},
    "Gemma2": {"sliding_window": 64, "query_pre_attn_scalar": 32},
    "Gemma3": {"sliding_window": 64, "query_pre_attn_scalar": 32},
}


@pytest.mark.parametrize("kind", KINDS)
def test_architecture_equals_the_reference(kind: str, tmp_path: Path) -> None:
    # No shared expert, mixed ranks, layers without experts, one expert for the question.
    odd = {"mix": 1.0, "rank_pattern": {"q_proj": 2, "up_proj": 6}, "question_expert": "guidance",
           "exclude_modules": ["v_proj"]}  # fmt: skip
    served = make_served(tmp_path, kind, odd if kind == "Qwen2" else {}, **KINDS[kind])
    model = load_served(served)
    asked = prompts(model, 16)
    engine = Engine(served, **TIGHT)
    written = engine.answers(asked)
    engine.close()
    assert len(equal(written, {n: reference(model, *request, BUDGET) for n, request in enumerate(asked)})) == 16


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_two_tensor_parallel_processes_equal_the_reference(
    kv_heads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # two processes on one NUMA node
    served = make_served(tmp_path, num_key_value_heads=kv_heads)
    model = load_served(served)
    asked = prompts(model, 16)
    engine = Engine(served, **TIGHT, tensor_parallel_size=2, distributed_executor_backend="mp")
    written = engine.answers(asked)
    engine.close()
    assert len(equal(written, {n: reference(model, *request, BUDGET) for n, request in enumerate(asked)})) == 16


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("form", [experts.ExpertWeights, merged.MergedExpertWeights])
def test_both_implementations_equal_the_reference(
    form: type,
    eager: bool,
    served: Path,
    asked: list[Asked],
    expected: dict[int, list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if form is experts.ExpertWeights:
        monkeypatch.setattr(models, "mergeable", lambda vllm_config: False)  # as on a GPU
    engine = Engine(served, **TIGHT, enforce_eager=eager)
    weights = engine.engine.model_executor.driver_worker.worker.model_runner.model.mote_expert_weights
    assert type(weights) is form
    answers = engine.answers(asked)
    engine.close()
    assert len(equal(answers, expected)) == len(asked)
