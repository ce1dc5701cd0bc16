"""The HTTP server seen by its clients: the openai client, curl, budgets, dialogues."""

import asyncio
import json
import subprocess
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from support.adapters import QUESTIONS
from support.servers import ask, wait_until

from mote.core.generation import Limits
from mote.core.records import Question
from mote.inference.inputs import as_question
from mote.inference.model import Model
from mote.serve.chat_request import parse_request
from mote.serve.server_settings import ServeSettings

MODES = ["adaptive", "direct", "analysis", "full", "base"]


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def reasoning_of(answer: Any) -> str:
    return "\n\n".join(step.text for step in answer.steps if step.name != "response" and step.text)


# --- the openai client


@pytest.mark.parametrize("mode", MODES)
def test_openai_client_gets_the_models_answer(client: openai.OpenAI, model: Model, mode: str) -> None:
    expected = model.answer(QUESTIONS[0], mode, max_step_tokens=8)
    reply = client.chat.completions.create(
        model=f"tiny:{mode}",
        messages=[{"role": "user", "content": QUESTIONS[0]}],
        extra_body={"max_step_tokens": 8},
    )
    choice = reply.choices[0]
    usage = reply.usage
    assert choice.message.content == expected.answer and choice.finish_reason == expected.finish
    assert getattr(choice.message, "reasoning_content", None) == (reasoning_of(expected) or None)
    assert usage is not None and usage.completion_tokens == expected.tokens.total
    assert usage.prompt_tokens + usage.completion_tokens == usage.total_tokens
    reasoned = sum(n for step, n in expected.tokens.steps.items() if step != "response")
    assert usage.completion_tokens_details is not None
    assert usage.completion_tokens_details.reasoning_tokens == reasoned
    assert reply.model == f"tiny:{mode}" and reply.id.startswith("chatcmpl-")


@pytest.mark.parametrize("mode", MODES)
def test_stream_adds_up_to_the_whole_answer(client: openai.OpenAI, model: Model, mode: str) -> None:
    expected = model.answer(QUESTIONS[2], mode, max_step_tokens=12)
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": QUESTIONS[2]}],
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"max_step_tokens": 12, "mode": mode},
    )
    chunks = list(stream)
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(d.delta.content or "" for d in deltas) == expected.answer
    assert "".join(getattr(d.delta, "reasoning_content", None) or "" for d in deltas) == reasoning_of(expected)
    assert deltas[0].delta.role == "assistant"
    assert [d.finish_reason for d in deltas if d.finish_reason] == [expected.finish]
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == expected.tokens.total
    told = [d.model_extra["mote"] for d in deltas if d.model_extra and "mote" in d.model_extra]
    assert told[-1] == {"mode": mode, "steps": expected.tokens.steps}
    assert {m["step"]: m["tokens"] for m in told if m.get("event") == "end"} == (
        expected.tokens.steps if mode != "base" else {}
    )


def test_64_concurrent_requests_equal_the_reference(address: str, model: Model) -> None:
    cases = [(f"{QUESTIONS[i % 3]} {i}", MODES[i % 5], 4 + i % 7) for i in range(64)]
    expected = [model.answer(text, mode, max_step_tokens=most) for text, mode, most in cases]

    async def all_of_them() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model=f"tiny:{mode}",
                        messages=[{"role": "user", "content": text}],
                        extra_body={"max_step_tokens": most},
                    )
                    for text, mode, most in cases
                )
            )

    for reply, answer in zip(asyncio.run(all_of_them()), expected, strict=True):
        message = reply.choices[0].message
        assert message.content == answer.answer
        assert (message.reasoning_content or "") == reasoning_of(answer)
        assert reply.usage.completion_tokens == answer.tokens.total


def test_each_of_n_answers_has_its_own_seed(address: str, model: Model) -> None:
    given: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0}
    expected = [model.answer("safe?", "direct", max_step_tokens=6, seed=7 + i, **given).answer for i in range(3)]
    body = ask(address, "safe?", mode="direct", n=3, seed=7, **given).json()
    assert [choice["message"]["content"] for choice in body["choices"]] == expected
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    lines = ask(address, "safe?", mode="direct", n=3, seed=7, stream=True, **given).text.split("\n\n")
    said = ["", "", ""]
    for line in lines[:-2]:
        for choice in json.loads(line.removeprefix("data: "))["choices"]:
            said[choice["index"]] += choice["delta"].get("content", "")
    assert said == expected and lines[-2:] == ["data: [DONE]", ""]


def test_samples_differ_without_a_seed(address: str) -> None:
    texts = {
        ask(address, temperature=2, top_p=1, mode="direct", max_step_tokens=16).json()["choices"][0]["message"][
            "content"
        ]
        for _ in range(4)
    }
    assert len(texts) > 1


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_the_response_and_frees_the_slot(address: str, model: Model, stream: bool) -> None:
    given: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "seed": 3, "max_step_tokens": 40}
    whole = model.answer(QUESTIONS[1], "full", **given)
    stop = whole.answer[6:9]
    assert len(stop) == 3
    expected = whole.answer[: whole.answer.index(stop)].rstrip()
    reply = ask(address, QUESTIONS[1], mode="full", stop=["never said", stop], stream=stream, **given)
    if stream:
        chunks = [json.loads(line[6:]) for line in reply.text.split("\n\n") if line.startswith("data: {")]
        said = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
        finish = chunks[-1]["choices"][0]["finish_reason"]
    else:
        choice = reply.json()["choices"][0]
        said = choice["message"]["content"]
        finish = choice["finish_reason"]
    assert (said, finish) == (expected, "stop")
    wait_until(lambda: model.batcher.rows == (0, 0))


def test_max_tokens_holds_and_leaves_room_for_the_response(address: str) -> None:
    body = ask(address, mode="full", max_tokens=30, max_step_tokens=None).json()
    assert body["usage"]["completion_tokens"] <= 30
    assert body["choices"][0]["mote"]["steps"]["response"] > 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("budget", [1, 2, 3, 5])
def test_small_max_tokens_answers_what_fits(address: str, model: Model, mode: str, budget: int) -> None:
    expected = model.answer(QUESTIONS[0], mode, max_step_tokens=6, max_tokens=budget)
    for name in ("max_tokens", "max_completion_tokens"):
        reply = ask(address, QUESTIONS[0], mode=mode, **{name: budget})
        assert reply.status_code == 200, reply.text
        choice = reply.json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (expected.answer, expected.finish)
        assert reply.json()["usage"]["completion_tokens"] == expected.tokens.total <= budget
        assert choice["finish_reason"] == "length" or budget > 3 or mode == "base"
    streamed = ask(address, QUESTIONS[0], mode=mode, max_tokens=budget, stream=True).text.split("\n\n")
    chunks = [json.loads(line[6:])["choices"][0] for line in streamed[:-2]]
    assert streamed[-2:] == ["data: [DONE]", ""] and chunks[-1]["finish_reason"] == expected.finish
    assert "".join(chunk["delta"].get("content") or "" for chunk in chunks) == expected.answer
    wait_until(lambda: model.batcher.rows == (0, 0))


def test_each_mode_is_a_listed_model(client: openai.OpenAI) -> None:
    names = [entry.id for entry in client.models.list()]
    assert names == ["tiny", "tiny:adaptive", "tiny:full", "tiny:analysis", "tiny:direct", "tiny:base"]
    assert client.models.retrieve("tiny:full").id == "tiny:full"
    with pytest.raises(openai.NotFoundError, match="'other' is not served here"):
        client.models.retrieve("other")


def test_reasoning_of_earlier_turns_is_dropped(address: str, model: Model) -> None:
    history = [
        {"role": "user", "content": "safe?"},
        {"role": "assistant", "content": "answer", "reasoning_content": "what I thought", "refusal": None},
        {"role": "user", "content": [{"type": "text", "text": "kill "}, {"type": "text", "text": "it"}]},
    ]
    plain = [{"role": "user", "content": "safe?"}, {"role": "assistant", "content": "answer"},
             {"role": "user", "content": "kill it"}]  # fmt: skip
    body = ask(address, history, mode="full").json()
    assert body["choices"][0]["message"]["content"] == model.answer(plain, "full", max_step_tokens=6).answer
    assert body["usage"]["prompt_tokens"] == len(model.request(as_question(plain), "full", Limits(6)).ids)


# What clients make of {"content": "answer", "reasoning_content": "what I thought"} in the next request.
RETURNED: list[dict[str, Any]] = [
    {"content": "\nanswer", "reasoning_content": "what I thought"},
    {"content": "\n\nanswer\n", "reasoning": "what I thought"},
    {"content": "answer", "reasoning_details": [{"type": "reasoning.text", "text": "what I thought"}]},
    {"content": "<think>what I thought</think>\n\nanswer"},
    {"content": '\n<think internal="InJlYXNvbmluZyI=">\nwhat I thought\n</think>\n\nanswer'},
    {"content": [{"type": "reasoning", "reasoning": "what I thought"}, {"type": "text", "text": "\nanswer"}]},
    {"content": [{"type": "thinking", "thinking": "what I thought"}, {"type": "text", "text": "answer"}]},
    {"content": [{"type": "refusal", "refusal": "answer"}]},
]


@pytest.mark.parametrize("turn", RETURNED)
def test_returned_reasoning_does_not_change_the_second_turn(turn: dict[str, Any], model: Model) -> None:
    def question(answer: dict[str, Any]) -> Question:
        turns = [("user", {"content": "safe?"}), ("assistant", answer), ("user", {"content": "kill it"})]
        messages = [{"role": role, **fields} for role, fields in turns]
        body = json.dumps({"model": "mote", "messages": messages}).encode()
        return parse_request(body, ServeSettings(), model.modes).question

    assert question(turn) == question({"content": "answer"})


def test_second_turn_from_inspect_reads_our_own_history(address: str, model: Model) -> None:
    pytest.importorskip("inspect_ai")
    from inspect_ai.model import ChatMessageUser, GenerateConfig, get_model

    async def two_turns() -> tuple[Any, Any]:
        config = GenerateConfig(temperature=0, max_tokens=40, max_retries=0)
        client = get_model("openai-api/mote/tiny:full", base_url=f"{address}/v1", api_key="none", config=config)
        first = await client.generate([ChatMessageUser(content=QUESTIONS[0])])
        history = [ChatMessageUser(content=QUESTIONS[0]), first.message, ChatMessageUser(content="kill it")]
        return first, await client.generate(history)

    first, second = asyncio.run(two_turns())
    assert [part.type for part in first.message.content] == ["reasoning", "text"]
    messages = [{"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": first.message.text},
                {"role": "user", "content": "kill it"}]  # fmt: skip
    expected = ask(address, messages, mode="full", max_tokens=40, max_step_tokens=None).json()
    assert second.usage.input_tokens == expected["usage"]["prompt_tokens"]
    assert second.message.text == expected["choices"][0]["message"]["content"]


def test_literal_thought_in_an_answer_stays_in_the_history(model: Model) -> None:
    contents = ["It ends with </think> then.", "Write <think>x</think> first.", "<think>x"]
    given = [({"content": content}, content) for content in contents]
    given.append(({"content": "<think>x</think> is a tag.", "reasoning": "r"}, "<think>x</think> is a tag."))
    for turn, text in given:
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", **turn}, {"role": "user", "content": "?"}]
        body = json.dumps({"model": "mote", "messages": messages}).encode()
        assert parse_request(body, ServeSettings(), model.modes).question.messages[1].content == text


STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' or (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ("uu", ["a\n\nb"]),
        ("au", ["b"]),
        ("uuaau", ["a\n\nb", "c\n\nd", "e"]),
        ("saau", ["a\n\nd"]),
        ("ssu", ["a\n\nb\n\nc"]),
        ("uasu", ["a", "b", "c\n\nd"]),
    ],
)
def test_irregular_turns_are_joined_for_strict_templates(
    address: str, model: Model, monkeypatch: pytest.MonkeyPatch, roles: str, expected: list[str]
) -> None:
    names = {"u": "user", "a": "assistant", "s": "system"}
    messages = [{"role": names[role], "content": text} for role, text in zip(roles, "abcde", strict=False)]
    regular = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(expected)]
    monkeypatch.setattr(model.tokenizer, "chat_template", STRICT)
    first = ask(address, messages, mode="full")
    assert first.status_code == 200, first.text
    assert first.json()["usage"] == ask(address, regular, mode="full").json()["usage"]
    ids = model.request(as_question(messages), "full", Limits(6)).ids
    assert ids == model.request(as_question(regular), "full", Limits(6)).ids


def test_include_reasoning_false_omits_reasoning(address: str) -> None:
    assert ask(address, mode="full").json()["choices"][0]["message"]["reasoning_content"]
    assert (
        ask(address, mode="full", include_reasoning=False).json()["choices"][0]["message"]["reasoning_content"] is None
    )
    streamed = ask(address, mode="full", include_reasoning=False, stream=True).text
    assert "reasoning_content" not in streamed and '"step":"analysis"' not in streamed


# --- curl


def curl(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        ["curl", "-sS", "-w", "\n%{http_code}", *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body


def test_curl_gets_an_answer_and_a_stream(address: str) -> None:
    body = json.dumps({"model": "tiny:direct", "messages": [{"role": "user", "content": "hi"}], "max_step_tokens": 4})
    typed = ("-H", "Content-Type: application/json", f"{address}/v1/chat/completions")
    status, whole = curl("-d", body, *typed)
    assert status == 200 and json.loads(whole)["object"] == "chat.completion"
    status, streamed = curl("-N", "-d", body[:-1] + ', "stream": true}', *typed)
    assert status == 200 and streamed.endswith("data: [DONE]\n\n")
    assert curl("-d", body, f"{address}/v1/chat/completions")[0] == 415
