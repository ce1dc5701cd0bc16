"""Continuous batching against plain generation: sequences that join, leave, share a prefix or are prefilled."""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.sampling import SeededSampler
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mote.core.generation import Sampling
from mote.inference import batching, kv_slots
from mote.inference.batching import Batcher
from mote.inference.grammar import FreeText
from mote.inference.request import Request

VOCAB, EOS = 60, 59
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.3}
FAMILIES: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=8)),
    "mistral, sliding window": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=9)),
    "gemma2, soft cap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**GROUPED, head_dim=8, sliding_window=9, attn_logit_softcapping=2.0)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, intermediate_size=48)),
}


def random_ids(length: int, seed: int) -> list[int]:
    return torch.randint(0, VOCAB - 1, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def requests(count: int = 9, shared: int = 21, temperature: float = 0.0) -> list[Request]:
    """Prompts of all lengths; two of three begin with one of two shared beginnings."""
    begins = [[], random_ids(shared, 100), random_ids(shared - 6, 101)]
    made = []
    for i in range(count):
        begin = begins[i % 3]
        ids = begin + random_ids(2 + 5 * i % 17, i)
        made.append(Request(ids, FreeText([EOS]), 3 + 4 * i % 11, len(begin), Sampling(temperature, 0.9, i)))
    return made


def alone(model: Any, request: Request) -> list[int]:
    """The same text from transformers' `generate`."""
    ids = torch.tensor([list(request.ids)])
    processors = []
    if request.sampling.temperature:
        processors.append(SeededSampler([request.sampling], ids.shape[1]))
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.limit, do_sample=False,
        eos_token_id=EOS, pad_token_id=0, logits_processor=processors,
    )  # fmt: skip
    found: list[int] = out[0, ids.shape[1] :].tolist()
    return found


def random_model(family: str) -> Any:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    for name, parameter in model.named_parameters():  # else every random model writes one token over and over
        if parameter.ndim > 1 and "norm" not in name:
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    return model


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny).eval()


@pytest.mark.parametrize("slots", [1, 2, 4, 16])
@pytest.mark.parametrize("chunk", [3, 512])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_batched_sequences_equal_plain_generation(
    model: Any, monkeypatch: pytest.MonkeyPatch, slots: int, chunk: int, temperature: float
) -> None:
    monkeypatch.setattr(batching, "_CHUNK_TOKENS", chunk)
    asked = requests(temperature=temperature)
    running = Batcher(model, slots)
    written = [future.result(60) for future in [running.submit(request) for request in asked]]
    assert written == [alone(model, request) for request in asked]
    assert len({len(ids) for ids in written}) > 3


@pytest.mark.parametrize("slots", [1, 4])
def test_slots_that_grow_keep_their_text(model: Any, monkeypatch: pytest.MonkeyPatch, slots: int) -> None:
    monkeypatch.setattr(kv_slots, "_SLOT_STEP", 1)
    asked = [replace(request, limit=40) for request in requests()]
    running = Batcher(model, slots)
    written = [future.result(60) for future in [running.submit(request) for request in asked]]
    assert written == [alone(model, request) for request in asked]
    assert max(map(len, written)) > 30


def test_slots_are_as_long_as_the_text_not_the_budget(model: Any) -> None:
    running = Batcher(model, 4)
    asked = [Request(random_ids(300 + n, 7), FreeText(range(model.config.vocab_size)), 5000, 300) for n in (1, 2, 3)]
    for future in [running.submit(request) for request in asked]:
        assert len(future.result(60)) == 1
    assert running._cache.capacity == kv_slots._SLOT_STEP  # the prefix of 300 tokens lies beside the slots
    assert all(layer.shape[2] == kv_slots._SLOT_STEP for layer in running._cache.keys)


@pytest.mark.parametrize("family", FAMILIES)
def test_model_families_equal_plain_generation(family: str) -> None:
    model = random_model(family)
    asked = requests(6)
    running = Batcher(model, 4)
    written = [future.result(60) for future in [running.submit(request) for request in asked]]
    assert written == [alone(model, request) for request in asked]
    assert len({token for ids in written for token in ids}) > 5


def test_cache_grows_with_the_number_of_sequences(model: Any) -> None:
    running = Batcher(model, 16)
    asked = requests(9)
    one_by_one = [running.submit(request).result(60) for request in asked]
    running.wait()
    assert {len(part) for part in (*running._cache.keys, *running._cache.values)} == {1}
    at_once = [future.result(60) for future in [running.submit(request) for request in asked]]
    assert at_once == one_by_one == [alone(model, request) for request in asked]
    assert {len(part) for part in (*running._cache.keys, *running._cache.values)} <= {2, 4, 8, 16}


def test_no_token_is_computed_twice(model: Any) -> None:
    asked = requests()
    running = Batcher(model, 2)
    written = [future.result(60) for future in [running.submit(request) for request in asked]]
    begins = {tuple(request.ids[: request.shared]) for request in asked}
    prompts = sum(len(request.ids) - request.shared for request in asked) + sum(map(len, begins))
    assert running.tokens_computed == prompts + sum(len(ids) - 1 for ids in written)


@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize("chunk", [3, 512])
def test_following_requests_reuse_the_slots_cache(
    model: Any, monkeypatch: pytest.MonkeyPatch, slots: int, chunk: int
) -> None:
    """Every other row writes, compares words and writes again; nothing that its slot holds is computed again."""
    monkeypatch.setattr(batching, "_CHUNK_TOKENS", chunk)
    asked = requests()
    running = Batcher(model, slots)
    found = {}
    computed = 0
    for number, request in enumerate(asked):
        request.shared = 0
        expected = alone(model, request)
        computed += len(request.ids) + len(expected) - 1
        if number % 2:
            found[number] = expected
            continue
        judged = replace(request, ids=[*request.ids, *expected, *random_ids(4, number)], words=(7, 9))
        behind = replace(
            request, ids=[*request.ids, *random_ids(30, number)], limit=9, sampling=Sampling(seed=number + 50)
        )
        pair = model(input_ids=torch.tensor([list(judged.ids)])).logits[0, -1, [7, 9]].softmax(0)
        found[number] = [expected, pytest.approx(float(pair[0].detach()), abs=1e-5), alone(model, behind)]
        computed += 1 + 4 + 30 + len(found[number][2]) - 1  # the last written token was not in the slot
        results: list[Any] = []
        behind.follow = lambda ids, results=results: [*results, ids]
        judged.follow = lambda score, results=results, behind=behind: results.append(score) or behind  # type: ignore[func-returns-value]
        request.follow = lambda ids, results=results, judged=judged: results.append(ids) or judged  # type: ignore[func-returns-value]
    futures = [running.submit(request) for request in asked]
    for number, future in enumerate(futures):
        assert future.result(60) == found[number], number
    assert running.tokens_computed == computed


def later_stage(request: Request, written: list[int], seed: int) -> Request:
    """The prompt of a chain's next stage: the one before, its text, and a few tokens more."""
    ids = [*request.ids, *written, *random_ids(3 + seed % 4, seed)]
    return Request(ids, request.grammar, 5 + seed % 3, request.shared, request.sampling)


@pytest.mark.parametrize("kept", [0, 6, 1 << 13])
@pytest.mark.parametrize("slots", [1, 3, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_later_stages_go_on_from_what_ended_sequences_left(
    monkeypatch: pytest.MonkeyPatch, family: str, slots: int, kept: int
) -> None:
    monkeypatch.setattr(batching, "_ENDED_TOKENS", kept)
    monkeypatch.setattr(kv_slots, "_SLOT_STEP", 1)
    model = random_model(family)
    running = Batcher(model, slots)
    asked = [replace(request, limit=request.limit + 2) for request in requests(12)]
    computed = []
    for stage in range(3):
        before = running.tokens_computed
        written = [future.result(60) for future in [running.submit(request) for request in asked]]
        running.wait()
        computed.append(running.tokens_computed - before)
        assert written == [alone(model, request) for request in asked], stage
        if stage == 0:
            asked = [later_stage(one, text, n) for n, (one, text) in enumerate(zip(asked, written, strict=True))]
        else:
            asked = asked[::-1]  # once more, as a retry is asked
    if kept > 6:  # of a retry only the prompt's last token is computed, and the new text
        alone_ids = sum(len(one.ids) - 1 for one in asked if not one.shared)
        assert computed[2] == alone_ids + sum(map(len, written)) < computed[0]


def test_scores_and_words_after_an_ended_sequence(model: Any) -> None:
    begin = random_ids(20, 5)
    first = Request([*begin, *random_ids(9, 6)], FreeText([EOS]), 6, len(begin))
    scored = [*first.ids, *random_ids(7, 8)]
    fresh, running = Batcher(model, 2), Batcher(model, 2)
    running.submit(first).result(60)
    running.wait()
    for request in (
        Request(scored, FreeText([EOS]), 0, len(begin), scored=9),
        Request([*first.ids, 3], FreeText([EOS]), 1, len(begin), words=(4, 9)),
    ):
        assert running.submit(request).result(60) == pytest.approx(fresh.submit(request).result(60), abs=1e-5)


def test_frequency_penalty_counts_generated_tokens(model: Any) -> None:
    request = Request(random_ids(5, 3), FreeText([EOS]), 12, frequency_penalty=1.5)
    ids = list(request.ids)
    written = []
    while len(written) < 12 and EOS not in written:
        logits = model(input_ids=torch.tensor([ids + written])).logits[0, -1].detach()
        for token in written:
            logits[token] -= 1.5
        written.append(int(logits.argmax()))
    assert Batcher(model, 2).submit(request).result(60) == written
    plain = Request(random_ids(5, 3), FreeText([EOS]), 12)
    assert Batcher(model, 2).submit(plain).result(60) != written


def test_words_are_compared_without_generating(model: Any) -> None:
    running = Batcher(model, 3)
    asked = requests(4)
    for request in asked:
        request.words = (7, 9)
    found = [future.result(60) for future in [running.submit(request) for request in asked]]
    for request, share in zip(asked, found, strict=True):
        pair = model(input_ids=torch.tensor([list(request.ids)])).logits[0, -1, [7, 9]].softmax(0)
        assert share == pytest.approx(float(pair[0].detach()), abs=1e-5)


def test_cancelling_frees_a_slot_and_spares_the_others(model: Any) -> None:
    running = Batcher(model, 2)
    begun: list[int] = []
    endless = Request(random_ids(5, 1), FreeText([EOS]), 100_000, on_token=begun.append)
    futures = [running.submit(request) for request in (endless, *requests(5))]
    while len(begun) < 3:
        time.sleep(0.001)
    assert futures[0].cancel()
    written = [future.result(60) for future in futures[1:]]
    with pytest.raises(CancelledError):
        futures[0].result(60)
    after = len(begun)
    assert after < 100_000
    assert written == [alone(model, request) for request in requests(5)]
    assert len(begun) == after


def test_long_sequences_limit_the_batch(model: Any) -> None:
    running = Batcher(model, 8, cache_tokens=2 * 40)
    most = 0
    forward = running._forward

    def counted(writing: Any, parts: Any, keep: Any) -> Tensor:
        nonlocal most
        most = max(most, len(writing) + len(parts))
        return forward(writing, parts, keep)

    running._forward = counted  # type: ignore[method-assign]
    asked = [Request(random_ids(30, i), FreeText([EOS]), 10) for i in range(5)]
    written = [future.result(60) for future in [running.submit(request) for request in asked]]
    assert most == 2
    assert written == [alone(model, request) for request in asked]


def test_error_fails_the_batch_but_not_the_next_request(model: Any) -> None:
    class Broken(FreeText):
        def ended(self, generated: Sequence[int]) -> bool:
            raise ValueError("broken grammar")

    running = Batcher(model, 1)
    futures = [running.submit(request) for request in (*requests(2), Request([1, 2], Broken([EOS]), 3), *requests(2))]
    for future in futures[2:]:
        with pytest.raises(ValueError, match="broken grammar"):
            future.result(60)
    request = requests(1)[0]
    assert running.submit(request).result(60) == alone(model, request)  # it continues with an empty batch


def test_idle_batch_has_no_thread_and_restores_attention(model: Any) -> None:
    before = model.config._attn_implementation
    running = Batcher(model, 2)
    futures = [running.submit(request) for request in requests(3)]
    running.wait()
    assert all(future.done() for future in futures)
    assert running._thread is not None and not running._thread.is_alive()
    assert model.config._attn_implementation == before


def test_scores_of_chunked_prompts_beside_decoding_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_CHUNK_TOKENS", 7)
    torch.manual_seed(0)
    model = FAMILIES["qwen3"]().eval()
    begin = random_ids(21, 100)
    scored = [Request(begin + random_ids(4 + own, own), FreeText([EOS]), 1, 20, scored=own) for own in (1, 6, 19)]
    written = requests(4)
    alone = [Batcher(model, 1).submit(request).result() for request in written]
    batcher = Batcher(model, 5)
    futures = [batcher.submit(request) for pair in zip(written, scored, strict=False) for request in pair]
    rest = batcher.submit(written[3])
    found = [future.result() for future in futures]
    assert [*found[::2], rest.result()] == alone
    for request, score in zip(scored, found[1::2], strict=True):
        rows = model(input_ids=torch.tensor([list(request.ids)])).logits[0, :-1].log_softmax(-1)
        own = rows[range(len(rows)), list(request.ids[1:])][-request.scored :]
        assert score == pytest.approx(float(own.detach().mean()), abs=1e-5)


def test_a_process_may_end_while_sequences_are_decoded(tiny: Path) -> None:
    code = (
        "import sys, time, transformers\n"
        "from mote.inference.batching import Batcher\n"
        "from mote.inference.grammar import FreeText\n"
        "from mote.inference.request import Request\n"
        "running = Batcher(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]), 2)\n"
        "running.submit(Request([1, 2, 3], FreeText(()), 100_000))\n"
        "time.sleep(0.2)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tiny)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
