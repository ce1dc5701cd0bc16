"""Mode adaptive+check over HTTP: content, reasoning, token counts."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from support.adapters import save_random_adapter
from support.checked import EXPERTS, QUESTIONS
from support.servers import ask, served

import mote
from mote.core.recipe import AnswerSettings
from mote.core.records import Answer
from mote.core.scheme import CHECKED
from mote.inference.inputs import as_question
from mote.inference.model import Model
from mote.tokens.encode import encode_prompt

THRESHOLD = 0.5  # some of the questions' answers pass, some never do


@pytest.fixture(scope="module")
def model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    adapter = save_random_adapter(tiny, tmp_path_factory.mktemp("adapter"), experts=EXPERTS)
    return mote.load(str(tiny), adapter, device="cpu")


@pytest.fixture(scope="module")
def address(model: Model) -> Iterator[str]:
    with served(model, answers=AnswerSettings(check_threshold=THRESHOLD)) as (address, _):
        yield address


@pytest.fixture(scope="module")
def answers(model: Model) -> list[Answer]:
    found: list[Answer] = model.answer(QUESTIONS, CHECKED, max_step_tokens=6, check_threshold=THRESHOLD)
    assert {answer.safe for answer in found} == {True, False} and max(len(answer.checks) for answer in found) == 3
    return found


def told(answer: Answer) -> dict[str, Any]:
    """The field `mote` of a whole answer."""
    return {
        "mode": CHECKED,
        "steps": answer.tokens.steps,
        "safe": answer.safe,
        "checks": [
            {"depth": c.depth, "safe": c.safe, "score": pytest.approx(c.score, abs=1e-4)} for c in answer.checks
        ],
        "dropped": answer.tokens.dropped,
    }


def test_openai_client_gets_the_answer_and_its_checks(address: str, answers: list[Answer]) -> None:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        assert f"tiny:{CHECKED}" in [entry.id for entry in client.models.list()]
        for question, answer in zip(QUESTIONS, answers, strict=True):
            reply = client.chat.completions.create(
                model=f"tiny:{CHECKED}", messages=[{"role": "user", "content": question}],
                extra_body={"max_step_tokens": 6, "temperature": 0},
            )  # fmt: skip
            (choice,) = reply.choices
            usage = reply.usage
            assert choice.message.content == answer.answer and choice.finish_reason == answer.finish
            reasoning = getattr(choice.message, "reasoning_content", "")
            for check in answer.checks:
                assert f"check: {'helpful' if check.safe else 'harmful'} ({check.score:.2f})" in reasoning
            assert all(step.text in reasoning for step in answer.steps[:-1])
            assert choice.model_extra and choice.model_extra["mote"] == told(answer)
            assert usage and usage.completion_tokens == answer.tokens.total and usage.completion_tokens_details
            reasoned = answer.tokens.total - answer.tokens.steps["response"]
            assert usage.completion_tokens_details.reasoning_tokens == reasoned


def test_stream_sends_no_content_before_the_check_passes(address: str, answers: list[Answer]) -> None:
    for question, answer in zip(QUESTIONS, answers, strict=True):
        reply = ask(address, question, mode=CHECKED, stream=True)
        chunks = [json.loads(line.removeprefix("data: ")) for line in reply.text.split("\n\n")[:-2]]
        choices = [chunk["choices"][0] for chunk in chunks]
        happened = [choice["mote"] for choice in choices if "event" in choice.get("mote", {})]
        checks = [news for news in happened if news["event"] == "check"]
        assert [(news["safe"], news["verdict"]) for news in checks] == [
            (check.safe, "helpful" if check.safe else "harmful") for check in answer.checks
        ]
        assert [news["score"] for news in checks] == pytest.approx([check.score for check in answer.checks], abs=1e-4)
        assert [news["deeper"] for news in happened if news["event"] == "again"] == [
            check.depth for check in answer.checks[1:]
        ]
        assert "".join(choice["delta"].get("content") or "" for choice in choices) == answer.answer
        last = max(i for i, choice in enumerate(choices) if choice.get("mote", {}).get("event") == "check")
        assert not any(choice["delta"].get("content") for choice in choices[:last])
        assert choices[-1]["mote"] == told(answer) and choices[-1]["finish_reason"] == answer.finish


def test_stop_and_hidden_reasoning_apply_after_the_check(address: str, answers: list[Answer]) -> None:
    question, answer = next((q, a) for q, a in zip(QUESTIONS, answers, strict=True) if len(a.answer) > 2)
    stop = answer.answer[1:3]
    (choice,) = ask(address, question, mode=CHECKED, stop=stop, include_reasoning=False).json()["choices"]
    assert choice["message"]["content"] == answer.answer[: answer.answer.find(stop)].rstrip()
    assert choice["message"]["reasoning_content"] is None and choice["finish_reason"] == "stop"
    assert choice["mote"] == told(answer)
    streamed = ask(address, question, mode=CHECKED, include_reasoning=False, stream=True).text
    assert "harmful" not in streamed and '"event":"check"' not in streamed


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 8, 11])
def test_small_max_tokens_checks_what_fits(model: Model, budget: int) -> None:
    with served(model, answers=AnswerSettings(check_threshold=1.0)) as (address, _):
        reply = ask(address, QUESTIONS[0], mode=CHECKED, max_tokens=budget)
    assert reply.status_code == 200, reply.text
    (choice,) = reply.json()["choices"]
    depths = [check["depth"] for check in choice["mote"]["checks"]]
    assert depths == ["direct", "analysis"][: 1 if budget < 8 else 2] and choice["mote"]["safe"] is False
    given = {step: tokens for step, tokens in choice["mote"]["steps"].items() if step != "check"}
    assert 0 < sum(given.values()) <= budget
    assert choice["finish_reason"] == "length" or sum(given.values()) < budget


def test_dropped_tokens_are_counted_in_the_metrics(address: str, answers: list[Answer]) -> None:
    def number() -> float:
        lines = httpx.get(f"{address}/metrics").text.splitlines()
        name = f'mote_tokens_total{{mode="{CHECKED}",step="dropped"}} '
        return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))

    question, answer = max(zip(QUESTIONS, answers, strict=True), key=lambda pair: pair[1].tokens.dropped)
    before = number()
    assert ask(address, question, mode=CHECKED, n=2).status_code == 200
    assert number() - before == 2 * answer.tokens.dropped > 0


def test_rest_of_the_context_is_budget_for_answer_and_check(model: Model) -> None:
    room = 2048 - len(encode_prompt(model.tokenizer, as_question("").messages))
    with served(model, answers=AnswerSettings(max_step_tokens=3000, check_threshold=1.0)) as (address, _):
        reply = ask(address, "\x00" * (room - 60), mode=CHECKED, max_step_tokens=None).json()
    (choice,) = reply["choices"]
    usage = reply["usage"]
    assert choice["mote"]["safe"] is False and choice["mote"]["checks"][-1]["depth"] == "full"
    given = usage["completion_tokens"] - choice["mote"]["dropped"] - choice["mote"]["steps"]["check"]
    assert usage["prompt_tokens"] == 2048 - 60 and 0 < given <= 60 - 2  # the marker, and what both words begin with
