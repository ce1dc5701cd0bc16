"""Requests one at a time through transformers' cache, against the running batch and against uncached forwards."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import QUESTIONS, save_random_adapter
from support.bases import HYBRID_TARGETS, make_hybrid_model
from support.grammar import GrammarProcessor
from transformers import AutoModelForCausalLM

import mote
from mote.core.generation import Sampling
from mote.inference.batching import Batcher
from mote.inference.grammar import FreeText
from mote.inference.inputs import as_question
from mote.inference.model import Model
from mote.inference.request import Request
from mote.inference.sequential import SequentialLoop
from mote.tokens.encode import encode_prompt

EOS = 59


def random_ids(length: int, seed: int) -> list[int]:
    ids: list[int] = torch.randint(0, EOS, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


def every_kind_of_request() -> list[Request]:
    ids, reply = random_ids(11, 0), random_ids(6, 1)
    judged = Request([*ids, *reply], FreeText(()), 1, words=(7, 9))
    return [
        Request(ids, FreeText([EOS]), 9),
        Request(ids, FreeText([EOS]), 9, sampling=Sampling(0.8, 0.9, 3)),
        Request(ids, FreeText([EOS]), 12, frequency_penalty=1.5),
        Request(ids, FreeText((), [4, 5]), 3, shared=5),
        judged,
        Request([*ids, *reply], FreeText(()), 1, scored=len(reply)),
        Request(ids, FreeText([EOS]), 4, follow=lambda generated: replace(judged, ids=[*ids, *generated])),
    ]


@pytest.fixture(scope="module")
def llama(tiny: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny).eval()


@pytest.fixture(scope="module")
def hybrid(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hybrid_model(tiny, tmp_path_factory.mktemp("hybrid"))


@pytest.fixture(scope="module")
def adapted_hybrid(hybrid: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("hybrid-adapter")
    save_random_adapter(hybrid, folder, target_modules=HYBRID_TARGETS)
    return mote.load(str(hybrid), folder, device="cpu")


def test_results_equal_those_of_the_running_batch(llama: Any) -> None:
    alone = SequentialLoop(llama)
    batch = Batcher(llama, 4)
    found = [alone.submit(request).result(60) for request in every_kind_of_request()]
    alone.wait()
    expected = [batch.submit(request).result(60) for request in every_kind_of_request()]
    for one, other in zip(found, expected, strict=True):
        assert one == (pytest.approx(other, abs=1e-5) if isinstance(other, float) else other)
    assert alone.rows == (0, 0)


def test_step_experts_of_a_hybrid_equal_uncached_forwards(adapted_hybrid: Model) -> None:
    model = adapted_hybrid
    assert isinstance(model.batcher, SequentialLoop)
    answers = model.answer(QUESTIONS, "full", max_step_tokens=5)
    chain = tuple(range(len(model.config.experts)))
    special = [i for i, token in model.tokenizer.added_tokens_decoder.items() if token.special]
    for question, answer in zip(QUESTIONS, answers, strict=True):
        ids = encode_prompt(model.tokenizer, as_question(question).messages)
        prompt = len(ids)
        grammar = GrammarProcessor(
            [chain], model.markers, special, model.tokenizer.eos_token_id, 5, prompt_length=prompt
        )
        while len(ids) == prompt or ids[-1] != model.markers.ends[-1]:
            row = torch.tensor([ids])
            ids.append(int(grammar(row, model.model(input_ids=row, use_cache=False).logits[:, -1]).argmax()))
        assert len(ids) - prompt == answer.tokens.total
        assert model.tokenizer.decode(ids[prompt:], skip_special_tokens=True).endswith(answer.answer)


def test_base_mode_of_a_hybrid_turns_the_experts_off(hybrid: Path, adapted_hybrid: Model) -> None:
    plain = mote.load(str(hybrid), device="cpu")
    expected = [answer.answer for answer in plain.answer(QUESTIONS, "base", max_step_tokens=6)]
    assert [answer.answer for answer in adapted_hybrid.answer(QUESTIONS, "base", max_step_tokens=6)] == expected
    assert len(set(expected)) > 1


def test_a_line_says_that_answers_come_one_at_a_time(
    hybrid: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mote.load(str(hybrid), device="cpu")
    line = capsys.readouterr().err
    assert "granitemoehybrid" in line and "slower" in line and line.count("\n") == 1
    mote.load(str(tiny), device="cpu")
    assert not capsys.readouterr().err


def test_cancelled_request_ends_and_the_next_one_runs(llama: Any) -> None:
    queue = SequentialLoop(llama)
    begun = []

    def cancel(token: int) -> None:
        begun.append(token)
        if len(begun) == 3:
            endless.cancel()

    endless = queue.submit(Request(random_ids(5, 1), FreeText(()), 100_000, on_token=cancel))
    after = queue.submit(Request(random_ids(5, 2), FreeText([EOS]), 4)).result(60)
    assert len(begun) == 3 and len(after) <= 4


def test_failing_request_leaves_the_queue_usable(llama: Any) -> None:
    class Broken(FreeText):
        def ended(self, generated: Any) -> bool:
            raise ValueError("broken grammar")

    queue = SequentialLoop(llama)
    with pytest.raises(ValueError, match="broken grammar"):
        queue.submit(Request([1, 2], Broken(()), 3)).result(60)
    queue.wait()
    assert len(queue.submit(Request([1, 2], FreeText(()), 3)).result(60)) == 3
