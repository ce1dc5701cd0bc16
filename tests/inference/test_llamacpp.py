"""The llama.cpp engine against the in-process one: the same tokens in float32, and the same use of the cache."""

import asyncio
import subprocess
import sys
import threading
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import QUESTIONS, save_random_adapter

import mote
from mote.chains.engine import Prompt
from mote.core.errors import MoteError, UserError
from mote.core.generation import Limits
from mote.core.records import Message
from mote.core.scheme import CHECKED
from mote.inference.engines import llama_batch, llama_files
from mote.inference.engines.llama_batch import LlamaBatcher
from mote.inference.engines.llama_files import base_files, open_base
from mote.inference.engines.local import LocalEngine
from mote.inference.events import Event
from mote.inference.inputs import as_question
from mote.inference.load import load
from mote.inference.model import Model
from mote.models.load import load_base
from mote.tokens.encode import encode_prompt

pytest.importorskip("xllamacpp", reason="llama.cpp (pip install 'mote-align[llamacpp]') is not installed")

EXPERTS = ("analysis", "guidance", "response", "check")
MODES = ("direct", "analysis", "full", "adaptive", "base", CHECKED)
LIMITS = Limits(6)
FORMS = ("gguf", "gguf-steps")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache folder of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_adapter(tiny, tmp_path_factory.mktemp("checked"), experts=EXPERTS)


@pytest.fixture(scope="module")
def reference(tiny: Path, folder: Path) -> Model:
    return mote.load(str(tiny), folder, device="cpu")


def refuse(*_: object) -> None:
    raise UserError("scheme: no slots")


@pytest.fixture(scope="module", params=FORMS)
def model(request: pytest.FixtureRequest, tiny: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "gguf-steps":  # as for a scheme without a slot plan
            patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("steps")))
            patch.setattr(llama_files, "check_switch", refuse)
        model = load(str(tiny), folder, dtype="float32", batch_size=4, engine="llamacpp")
        assert isinstance(model.batcher, LlamaBatcher)
        assert bool(model.batcher._files.loras) == (request.param == "gguf-steps")
        yield model
        model.batcher.close()


def text_of(answers: Any) -> Any:
    return [(answer.steps, answer.tokens, answer.finish, answer.safe) for answer in answers]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("more", [{}, {"temperature": 1.5, "seed": 3}, {"max_tokens": 14}])
def test_answers_equal_the_in_process_engines(model: Model, reference: Model, mode: str, more: Any) -> None:
    given = {"max_step_tokens": 6, "check_threshold": 0.6} | more
    expected = reference.answer(QUESTIONS, mode, **given)
    assert text_of(model.answer(QUESTIONS, mode, **given)) == text_of(expected)


def test_a_batch_mixes_modes_and_turns(model: Model, reference: Model) -> None:
    turns: Any = [{"role": "user", "content": "safe?"}, {"role": "assistant", "content": "on my computer"}]
    dialogue = [*turns, {"role": "user", "content": "how do I answer"}]
    questions = [as_question(asked) for asked in (*QUESTIONS, dialogue, *QUESTIONS, dialogue)]
    modes = [MODES[i % len(MODES)] for i in range(len(questions))]

    def answers(model: Model) -> Any:
        futures = [model.submit(q, mode, LIMITS, shared=True) for q, mode in zip(questions, modes, strict=True)]
        outputs = zip(questions, futures, modes, strict=True)
        return text_of(model.read(q, future.result(60), mode, LIMITS) for q, future, mode in outputs)

    assert answers(model) == answers(reference)


def test_no_token_is_computed_twice(model: Model, reference: Model) -> None:
    for text in ("zoo: how do I kill unsafe", "0 analysis of my computer"):  # other first words than other tests
        question = as_question(text)
        prompt = len(encode_prompt(model.tokenizer, question.messages))
        before = model.batcher.tokens_computed
        answer = model.answer(question, "full", max_step_tokens=6)
        computed = model.batcher.tokens_computed - before
        begun = len(encode_prompt(model.tokenizer, question.messages)[:1])  # what all dialogues here begin with
        assert prompt + answer.tokens.total - 1 - 8 <= computed <= prompt + answer.tokens.total - begun


def test_the_next_turn_computes_only_what_is_new(model: Model, reference: Model) -> None:
    turns = [{"role": "user", "content": "how do I kill a process safely on this computer"}]
    first = model.answer(turns, "full", max_step_tokens=6)
    known = len(encode_prompt(model.tokenizer, as_question(turns).messages)) - 3  # "<|im_start|>assistant\n" follows
    turns += [{"role": "assistant", "content": first.answer}, {"role": "user", "content": "and a phone?"}]
    prompt = len(encode_prompt(model.tokenizer, as_question(turns).messages))
    before = model.batcher.tokens_computed
    second = model.answer(turns, "full", max_step_tokens=6)
    assert model.batcher.tokens_computed - before <= prompt - known + second.tokens.total
    assert second.steps == reference.answer(turns, "full", max_step_tokens=6).steps


def test_a_retry_computes_its_prompt_no_second_time(tiny: Path) -> None:
    base = open_base(str(tiny))
    batcher = LlamaBatcher(base_files(str(tiny), base.tokenizer, dtype="float32"), 1)
    engine = LocalEngine(base, 1, batcher)
    lead = (Message(role="user", content="how do I answer"), Message(role="assistant", content="analysis"))
    asked = [
        Prompt((*lead, Message(role="user", content=text)), 3, temperature=1, seed=seed, shared=2)
        for text, seed in (("kill a process on this computer", 1), ("is it safe?", 1))
    ]

    async def ask() -> list[int]:
        computed = []
        for prompt in (*asked, replace(asked[0], seed=2)):
            before = batcher.tokens_computed
            written = await engine.write(prompt)
            computed.append(batcher.tokens_computed - before - written.tokens)
        await engine.close()
        return computed

    first, second, retry = asyncio.run(ask())
    assert first > second > retry == 0  # of the prompt only the last token, whose logits are needed


def test_a_shared_question_is_computed_once(model: Model) -> None:
    question = as_question("one question for every mode of the same model and computer")
    prompt = len(encode_prompt(model.tokenizer, question.messages))
    before = model.batcher.tokens_computed
    futures = [model.submit(question, mode, LIMITS, shared=True) for mode in ("direct", "analysis", "full")]
    generated = sum(len(future.result(60)) for future in futures)
    assert model.batcher.tokens_computed - before == prompt - 1 + generated


def test_events_add_up_to_the_answer(model: Model) -> None:
    events: list[Event] = []
    answer = model.answer(QUESTIONS[0], "full", max_step_tokens=6, on_event=events.append)
    for step in answer.steps:
        told = "".join(event.text for event in events if event.kind == "text" and event.step == step.name)
        assert told.strip() == step.text
    assert events[-1].kind == "done" and events[-1].tokens == answer.tokens.total


def test_a_cancelled_answer_frees_its_slot(model: Model, reference: Model) -> None:
    begun = threading.Event()
    future = model.submit(as_question(QUESTIONS[0]), "full", Limits(1500), on_token=lambda _: begun.set())
    begun.wait(60)
    assert future.cancel()
    with pytest.raises(CancelledError):
        future.result(60)
    expected = reference.answer(QUESTIONS, "full", max_step_tokens=6)
    assert text_of(model.answer(QUESTIONS, "full", max_step_tokens=6)) == text_of(expected)
    model.batcher.wait()
    assert model.batcher.rows == (0, 0)


def test_an_error_fails_the_batch_but_not_the_next_request(
    model: Model, reference: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(model.batcher, LlamaBatcher)
    with monkeypatch.context() as patch:
        patch.setattr(model.batcher._model._lib, "llama_decode", lambda *_: -3)
        with pytest.raises(MoteError, match=r"llama\.cpp failed to compute .* -3"):
            model.answer(QUESTIONS, "full")
    expected = reference.answer(QUESTIONS, "full", max_step_tokens=6)
    assert text_of(model.answer(QUESTIONS, "full", max_step_tokens=6)) == text_of(expected)


def test_more_than_the_cache_holds_waits(
    tiny: Path, folder: Path, reference: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_batch, "_CACHE_UNIT", 512)
    own = load(str(tiny), folder, dtype="float32", batch_size=8, engine="llamacpp")
    assert isinstance(own.batcher, LlamaBatcher)
    own.batcher._cache_tokens = 512
    limits = Limits(40)
    questions = [as_question(f"{text} {i}") for i in range(3) for text in QUESTIONS]
    futures = [own.submit(question, "full", limits) for question in questions]
    found = [own.read(q, future.result(120), "full", limits) for q, future in zip(questions, futures, strict=True)]
    assert text_of(found) == text_of(reference.answer_questions(questions, "full", limits))
    assert own.batcher._room == 512
    asked = as_question(QUESTIONS[0])
    assert own.submit(asked, "direct", Limits(800)).result(120) and own.batcher._room > 512  # alone: what it needs
    own.batcher.close()


def test_base_mode_needs_the_usual_opening(model: Model) -> None:
    assert isinstance(model.batcher, LlamaBatcher)
    request = model.request(as_question("safe?"), "base", LIMITS)
    request.ids = [7, *request.ids]
    if model.batcher._files.loras:
        assert model.batcher.submit(request).result(60)
    else:
        with pytest.raises(UserError, match="mode 'base' needs prompts that begin"):
            model.batcher.submit(request)


def chain_results(engine: LocalEngine) -> Any:
    lead = (Message(role="user", content="how do I answer"), Message(role="assistant", content="analysis"))
    texts = ["kill a process", "safe", "is it safe or unsafe on my computer?", "unsafe analysis", "answer"]
    prompts = [
        Prompt(
            (*lead, Message(role="user", content=text)), 12, temperature=i % 2, seed=i, frequency_penalty=0.5, shared=2
        )
        for i, text in enumerate(texts)
    ]

    async def ask() -> Any:
        try:
            written = await asyncio.gather(*(engine.write(prompt) for prompt in prompts))
            chosen = await asyncio.gather(*(engine.choose(prompt, ("safe", "unsafe")) for prompt in prompts))
            scored = await asyncio.gather(*(engine.score(prompt, "kill a process " * 30) for prompt in prompts))
            return written, [found.score for found in chosen], [found.mean for found in scored]
        finally:
            await engine.close()

    return asyncio.run(ask())


def test_chain_requests_equal_the_in_process_engines(tiny: Path) -> None:
    base = open_base(str(tiny))
    files = base_files(str(tiny), base.tokenizer, dtype="float32")
    written, chosen, scored = chain_results(LocalEngine(base, 3, LlamaBatcher(files, 3)))
    expected = chain_results(LocalEngine(load_base(str(tiny), device="cpu"), 3))
    assert written == expected[0]
    assert chosen == pytest.approx(expected[1], abs=1e-4)
    assert scored == pytest.approx(expected[2], abs=1e-4)


def test_a_text_in_the_cache_is_scored_as_a_new_one(tiny: Path) -> None:
    base = open_base(str(tiny))
    engine = LocalEngine(base, 1, LlamaBatcher(base_files(str(tiny), base.tokenizer, dtype="float32"), 1))
    prompt = Prompt((Message(role="user", content="how do I answer"),), 4)

    async def ask() -> list[float]:
        means = [(await engine.score(prompt, "kill a process")).mean for _ in range(2)]
        await engine.close()
        return means

    first, again = asyncio.run(ask())
    assert again == pytest.approx(first, abs=1e-4)


def test_a_gguf_file_is_a_base_model(tiny: Path) -> None:
    base = open_base(str(tiny))
    files = base_files(str(tiny), base.tokenizer, dtype="float32")
    named = open_base(str(files.model))
    engine = LocalEngine(named, 3, LlamaBatcher(base_files(str(files.model), named.tokenizer, dtype="float32"), 3))
    assert chain_results(engine)[0] == chain_results(LocalEngine(load_base(str(tiny), device="cpu"), 3))[0]


def test_files_are_made_once_for_an_adapters_weights(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number, (seed, kind) in enumerate([(1, "auto"), (1, "auto"), (2, "auto"), (2, "float16"), (1, "auto")]):
        save_random_adapter(tiny, tmp_path / "adapter", seed=seed)
        made = load(str(tiny), tmp_path / "adapter", dtype=kind, engine="llamacpp")
        made.batcher.close()
        said = capsys.readouterr().err
        assert ("writing" in said) == (number in (0, 2, 3)), said
    assert len(list((tmp_path / "cache" / "mote" / "gguf").iterdir())) == 3


def test_one_answer_at_a_time_takes_the_faster_form(tiny: Path, folder: Path, reference: Model) -> None:
    own = load(str(tiny), folder, dtype="float32", batch_size=1, engine="llamacpp")
    assert isinstance(own.batcher, LlamaBatcher) and own.batcher._files.loras
    assert text_of(own.answer(QUESTIONS, "full", max_step_tokens=6)) == text_of(
        reference.answer(QUESTIONS, "full", max_step_tokens=6)
    )
    own.batcher.close()


def test_a_script_ends_with_a_model_that_is_loaded(tiny: Path, folder: Path) -> None:
    script = f"import mote; model = mote.load({str(tiny)!r}, {str(folder)!r}, engine='llamacpp'); model.answer('safe?')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype: the engine llamacpp does not support bfloat16"),
        ({"device": "cuda"}, "device: the engine llamacpp runs on a CPU, not on cuda"),
    ],
)
def test_settings_it_does_not_have_are_refused(tiny: Path, folder: Path, settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(str(tiny), folder, engine="llamacpp", **settings)


def test_an_adapter_it_cannot_run_is_refused(tiny: Path, tmp_path: Path) -> None:
    save_random_adapter(tiny, tmp_path, whole_rows=True)
    with pytest.raises(UserError, match=r"engine: llamacpp cannot run this adapter: .* use --engine transformers"):
        load(str(tiny), tmp_path, engine="llamacpp")


def test_quantised_answers_are_near_those_in_float32(tiny: Path, folder: Path, reference: Model) -> None:
    own = load(str(tiny), folder, engine="llamacpp")
    ids = encode_prompt(own.tokenizer, as_question(QUESTIONS[2]).messages)
    request = own.request(as_question(QUESTIONS[2]), "direct", LIMITS)
    request.limit = 0
    request.words = (40, 50)
    score = own.batcher.submit(request).result(60)
    with torch.no_grad():
        logits = reference.model(input_ids=torch.tensor([ids])).logits[0, -1, [40, 50]]
    assert score == pytest.approx(float(logits.softmax(0)[0]), abs=0.05)
    own.batcher.close()
