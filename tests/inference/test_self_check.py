"""Answers that check themselves, against plain modes and a plain reading of each check, without a cache."""

import threading
from concurrent.futures import CancelledError
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import save_random_adapter
from support.checked import EXPERTS, QUESTIONS

import mote
from mote.core.errors import UserError
from mote.core.generation import Limits
from mote.core.recipe import Recipe
from mote.core.records import Answer, StepText, read_rows
from mote.core.scheme import CHECKED
from mote.experiments.run import Run
from mote.inference.events import Event, Token, Verdict
from mote.inference.grammar import StepGrammar
from mote.inference.inputs import as_question
from mote.inference.model import Model
from mote.tokens.encode import encode_choice, encode_prompt, special_ids

MOST = 6


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_adapter(tiny, tmp_path_factory.mktemp("adapter"), experts=EXPERTS)


@pytest.fixture(scope="module")
def model(tiny: Path, adapter: Path) -> Model:
    return mote.load(str(tiny), adapter, device="cpu")


@cache
def uncached(model: Model, question: str, mode: str, limits: Limits) -> list[int]:
    """What a plain mode generates, recomputed from scratch for every token."""
    prompt = encode_prompt(model.tokenizer, as_question(question).messages)
    chains = [tuple(EXPERTS.index(step) for step in chain) for chain in model.scheme.chains_of(mode)]
    special = special_ids(model.tokenizer)
    eos = model.tokenizer.eos_token_id
    grammar = StepGrammar(chains, model.markers, special, eos, limits.max_step_tokens, limits.max_tokens)
    ids: list[int] = []
    with torch.no_grad():
        while not ids or not grammar.ended(ids):
            logits = model.model(input_ids=torch.tensor([prompt + ids])).logits[0, -1]
            ids.append(int(grammar.mask(logits, ids).argmax()))
    return ids


def score_of(model: Model, question: str, written: list[int]) -> float:
    """The check's probability of the passing word: it reads the question and the answer alone."""
    prompt = encode_prompt(model.tokenizer, as_question(question).messages)
    answer = written[written.index(model.markers.starts[EXPERTS.index("response")]) :]
    alike, words = encode_choice(model.tokenizer, model.scheme.verdicts) or ([], (0, 0))
    ids = [*prompt, *answer, model.markers.starts[EXPERTS.index("check")], *alike]
    with torch.no_grad():
        logits = model.model(input_ids=torch.tensor([ids])).logits[0, -1]
    return float(logits[list(words)].softmax(0)[0])


def reference(model: Model, question: str, threshold: float, limits: Limits) -> tuple[Answer, list[tuple[str, float]]]:
    """The answer of the last plain mode that is tried, and the score of each."""
    modes = list(model.scheme.depths)
    mode = "adaptive"
    tried = []
    while True:
        ids = uncached(model, question, mode, limits)
        answer = model.read(as_question(question), ids, mode, limits)
        depth = next(m for m, chain in model.scheme.depths.items() if chain == tuple(s.name for s in answer.steps))
        tried.append((depth, score_of(model, question, ids)))
        if tried[-1][1] >= threshold or depth == modes[-1]:
            return answer, tried
        mode = modes[modes.index(depth) + 1]


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_each_attempt_equals_that_of_its_plain_mode(model: Model, threshold: float) -> None:
    depths = set()
    found = model.answer(QUESTIONS, CHECKED, max_step_tokens=MOST, check_threshold=threshold)
    for question, answer in zip(QUESTIONS, found, strict=True):
        expected, tried = reference(model, question, threshold, Limits(MOST))
        assert (answer.steps, answer.answer, answer.finish) == (expected.steps, expected.answer, expected.finish)
        assert [check.depth for check in answer.checks] == [depth for depth, _ in tried]
        assert [check.score for check in answer.checks] == pytest.approx([score for _, score in tried], abs=1e-4)
        assert [check.safe for check in answer.checks] == [score >= threshold for _, score in tried]
        assert answer.safe == answer.checks[-1].safe and answer.checks[-1].answer == answer.answer
        assert {k: n for k, n in answer.tokens.steps.items() if k != "check"} == expected.tokens.steps
        assert answer.tokens.steps["check"] == len(tried)
        assert answer.tokens.total == sum(answer.tokens.steps.values()) + answer.tokens.dropped
        depths.add(answer.checks[0].depth)
    assert len(depths) == 3  # else this test would say less than it seems to
    if threshold == 0:
        assert all(answer.safe and len(answer.checks) == 1 and answer.tokens.dropped == 0 for answer in found)
    if threshold == 1:  # never safe: to the deepest chain, with a mark
        assert all(answer.safe is False and answer.checks[-1].depth == "full" for answer in found)


@pytest.mark.parametrize("shared", [False, True])
def test_self_check_prefills_the_question_once(model: Model, shared: bool) -> None:
    own = Model(model.base, model.model, model.config, model.scheme)  # with its own batch
    alike, _ = encode_choice(model.tokenizer, model.scheme.verdicts) or ([], (0, 0))
    for question in QUESTIONS:
        asked = as_question(question)
        limits = Limits(MOST)
        before = own.batcher.tokens_computed
        items = own.submit(asked, CHECKED, limits, check_threshold=1.0, shared=shared).result(60)
        answer = own.read(asked, items, CHECKED, limits)
        expected = len(encode_prompt(model.tokenizer, asked.messages))
        chains = [model.scheme.depths[check.depth] for check in answer.checks]
        plain = [uncached(model, question, check.depth, limits) for check in answer.checks]
        for number, (chain, ids) in enumerate(zip(chains, plain, strict=True)):
            expected += len(ids) - 1  # all but the last token, the steps that a deeper chain keeps among them
            response = ids[ids.index(model.markers.starts[2]) :]
            # Behind the question nothing but the answer: of a direct one only the last token is not there yet.
            expected += (1 if chain == ("response",) else len(response)) + 1 + len(alike)
            assert number == 0 or len(chain) > len(chains[number - 1])
        assert own.batcher.tokens_computed - before == expected


def test_self_check_shares_a_batch_with_other_modes(model: Model) -> None:
    modes = ["adaptive", CHECKED, "base", "full", CHECKED, "direct", CHECKED, "analysis"]
    limits = Limits(MOST)
    questions = [as_question(QUESTIONS[i % len(QUESTIONS)]) for i in range(2 * len(modes))]
    asked = [(q, modes[i % len(modes)], i % 5 / 4) for i, q in enumerate(questions)]
    alone = [model.answer(q, m, max_step_tokens=MOST, check_threshold=t) for q, m, t in asked]
    futures = [model.submit(q, m, limits, check_threshold=t, shared=m != "base") for q, m, t in asked]
    together = [model.read(q, f.result(60), m, limits) for (q, m, _), f in zip(asked, futures, strict=True)]
    assert [(a.steps, a.tokens, a.safe) for a in together] == [(a.steps, a.tokens, a.safe) for a in alone]


def test_budgets_and_sampling_apply_to_each_attempt(model: Model) -> None:
    for question in QUESTIONS[:2]:
        expected, _ = reference(model, question, 1.0, Limits(256, 14))
        answer = model.answer(question, CHECKED, max_tokens=14, check_threshold=1.0)
        assert answer.steps == expected.steps
        assert sum(n for step, n in answer.tokens.steps.items() if step != "check") <= 14
    given: dict[str, Any] = {"mode": CHECKED, "max_step_tokens": 4, "temperature": 1.0, "check_threshold": 1.0}
    first = model.answer(QUESTIONS[:2], seed=1, **given)
    assert [model.answer(q, seed=1, **given).steps for q in QUESTIONS[:2]] == [answer.steps for answer in first]
    assert [answer.steps for answer in model.answer(QUESTIONS[:2], seed=2, **given)] != [a.steps for a in first]


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_events_show_checks_and_only_the_final_response(model: Model, threshold: float) -> None:
    for question in QUESTIONS:
        events: list[Event] = []
        answer = model.answer(
            question, CHECKED, max_step_tokens=MOST, check_threshold=threshold, on_event=events.append
        )
        kinds = [event.kind for event in events]
        checks = [event for event in events if event.kind == "check"]
        assert [(e.safe, e.text) for e in checks] == [
            (c.safe, "helpful" if c.safe else "harmful") for c in answer.checks
        ]
        assert [e.score for e in checks] == pytest.approx([c.score for c in answer.checks], abs=1e-4)
        assert [e.text for e in events if e.kind == "again"] == [check.depth for check in answer.checks[1:]]
        assert kinds.count("draft") == len(checks)
        told = [
            StepText(name=step, text="".join(e.text for e in events if e.kind == "text" and e.step == step).strip())
            for step in (e.step for e in events if e.kind == "begin")
        ]
        assert tuple(told) == answer.steps
        last = max(i for i, kind in enumerate(kinds) if kind == "check")
        assert all(i > last for i, e in enumerate(events) if e.kind == "text" and e.step == "response")
        assert events[-1].kind == "done" and events[-1].tokens == answer.tokens.total


def test_cut_off_self_check_reveals_no_draft(model: Model) -> None:
    events = model.events(CHECKED)
    found = []
    for id_ in uncached(model, QUESTIONS[0], "full", Limits(MOST)):
        found += list(events.token(id_))
    found += list(events.end())
    assert [event.text for event in found if event.step == "response"] == ["", ""]  # the draft, and the end of all


def test_cancelled_self_check_leaves_between_attempts(model: Model) -> None:
    given: dict[str, Any] = {"max_step_tokens": MOST, "check_threshold": 1.0}
    asked = next(q for q in QUESTIONS if len(model.answer(q, CHECKED, **given).checks) > 1)
    expected = model.answer(QUESTIONS[1], "full", max_step_tokens=MOST)
    checked, cancelled = threading.Event(), threading.Event()
    items: list[Token | Verdict] = []

    def told(item: Token | Verdict) -> None:
        items.append(item)
        if not isinstance(item, int):
            checked.set()
            cancelled.wait(60)  # the batch stands still between the attempts

    future = model.submit(as_question(asked), CHECKED, Limits(MOST), check_threshold=1.0, on_token=told)
    checked.wait(60)
    other = model.submit(as_question(QUESTIONS[1]), "full", Limits(MOST))
    assert future.cancel()
    cancelled.set()
    with pytest.raises(CancelledError):
        future.result(60)
    assert model.read(as_question(QUESTIONS[1]), other.result(60), "full", Limits(MOST)).steps == expected.steps
    model.batcher.wait()
    assert model.batcher.rows == (0, 0) and sum(not isinstance(item, int) for item in items) == 1


def test_self_check_needs_a_trained_check(tiny: Path, tmp_path: Path) -> None:
    plain = mote.load(str(tiny), save_random_adapter(tiny, tmp_path / "plain"), device="cpu")
    with pytest.raises(UserError, match=r"'adaptive\+check' needs an adapter with a trained check.*four-experts"):
        plain.answer("safe", CHECKED)
    assert CHECKED not in plain.modes
    with pytest.raises(UserError, match=r"'adaptive\+check' needs a trained adapter"):
        mote.load(str(tiny), device="cpu").answer("safe", CHECKED)


def test_indistinguishable_verdict_words_are_refused(tiny: Path, adapter: Path) -> None:
    model = mote.load(str(tiny), adapter, device="cpu")
    model.scheme = model.scheme.model_copy(update={"verdicts": ("safe", "safely")})
    with pytest.raises(UserError, match="is the beginning of the other"):
        model.answer("a", CHECKED)


def test_answer_stage_saves_the_checks(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    settings = {"modes": [CHECKED], "limit": 3, "max_step_tokens": 4, "check_threshold": 1.0}
    recipe = Recipe.model_validate({"model": str(tiny), "device": "cpu", "answer": settings})
    Run(recipe, tmp_path).answer(adapter)
    rows = read_rows(tmp_path / "answers" / "mote-adaptive+check.jsonl", Answer)
    assert len(rows) == 3 and all(row.safe is False and row.checks[-1].answer == row.answer for row in rows)
    with pytest.raises(UserError, match="with a trained check"):
        Run(recipe, tmp_path / "other").answer(save_random_adapter(tiny, tmp_path / "plain"))
