"""The HTTP server's refusals and limits: bad requests, keys, full queue, timeouts, disconnects, health, shutdown."""

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from support.servers import ask, served, wait_until

from mote.inference.model import Model
from mote.serve.server import Server

# --- refused requests


@pytest.mark.parametrize(
    ("fields", "status", "param", "said"),
    [
        ({"tools": [{"type": "function"}]}, 422, "tools", "does not support it"),
        ({"logprobs": True}, 422, "logprobs", "does not support it"),
        ({"top_k": 20}, 422, "top_k", "does not support it"),
        ({"response_format": {"type": "json_object"}}, 422, "response_format", "does not support it"),
        ({"presence_penalty": 0.5}, 422, "presence_penalty", "does not support it"),
        ({"max_step_token": 5}, 400, "max_step_token", "did you mean 'max_step_tokens'?"),
        ({"model": "gpt-4"}, 404, "model", "'gpt-4' is not served here; use one of ['tiny', 'tiny:base'"),
        ({"model": "tiny:deep"}, 404, "model", "'tiny:deep' is not served here"),
        ({"mode": "deep"}, 400, "mode", "'deep' is not a mode"),
        ({"mode": "adaptive+check"}, 400, "mode", "needs an adapter with a trained check (train.method=four-experts)"),
        ({"model": "tiny:adaptive+check"}, 400, "mode", "needs an adapter with a trained check"),
        ({"model": "tiny:full", "mode": "direct"}, 400, "mode", "contradicts the model's name 'tiny:full'"),
        ({"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ({"temperature": "warm"}, 400, "temperature", "valid number"),
        ({"n": 9}, 400, "n", "less than or equal to 8"),
        ({"stop": ["a"] * 5}, 400, "stop", "at most 4 items"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ({"max_completion_tokens": 0}, 400, "max_completion_tokens", "greater than or equal to 1"),
        ({"max_tokens": 5000}, 400, "max_tokens", "5000 is more than the 4096 that this server generates"),
        ({"max_tokens": 2040, "max_step_tokens": None}, 400, "messages", "exceed the model's context of 2048"),
        ({"max_tokens": 20, "max_completion_tokens": 30}, 400, "max_tokens", "differs from max_completion_tokens"),
        ({"messages": []}, 400, "messages", "at least 1 item"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages", "last message must be the user's"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 422, "messages.0", "role 'tool' is not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]}, 422,
         "messages.0.content", "only text is supported, not 'image_url'"),
        ({"messages": [{"role": "user", "content": "x" * 100_001}]}, 413, "messages", "100001 characters, more than"),
        ({"messages": [{"role": "user", "content": "kill " * 4000}]}, 400, "messages", "model's context of 2048"),
    ],
)  # fmt: skip
def test_unsupported_fields_are_refused_by_name(
    address: str, fields: dict[str, Any], status: int, param: str, said: str
) -> None:
    reply = ask(address, **({"max_step_tokens": 6} | fields))
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (status, param) and said in error["message"], error
    assert set(error) == {"message", "type", "param", "code"}


def test_fields_without_effect_are_accepted(address: str) -> None:
    plain = ask(address).json()["choices"]
    fields: dict[str, Any] = {
        "user": "me", "store": False, "metadata": {"a": "b"}, "tools": [], "tool_choice": "auto", "logprobs": False,
        "response_format": {"type": "text"}, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": None,
        "parallel_tool_calls": True, "service_tier": "auto", "functions": None, "stream_options": None,
        "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "chat_template_kwargs": {},
    }  # fmt: skip
    assert ask(address, **fields).json()["choices"] == plain


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 50_000, b'{"model": "tiny", "messages": 3}',
             b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}']
)  # fmt: skip
def test_malformed_bodies_get_400_as_json(address: str, body: bytes) -> None:
    reply = httpx.post(
        f"{address}/v1/chat/completions", content=body, headers={"content-type": "application/json"}, timeout=30
    )
    assert reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error"


def test_unknown_routes_and_methods_get_errors_as_json(address: str) -> None:
    for reply, status in (
        (httpx.get(f"{address}/v1/embeddings"), 404),
        (httpx.get(f"{address}/v1/chat/completions"), 405),
        (httpx.get(f"{address}/v1/models", headers={"host": "evil.example"}), 403),
    ):
        assert reply.status_code == status and reply.json()["error"]["message"]
    assert httpx.get(f"{address}/v1/models", headers={"host": "localhost:1"}).status_code == 200


def test_oversized_body_is_refused_while_it_is_read(model: Model) -> None:
    sent = 0

    def body() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(4000):
            sent += 1 << 16
            yield b" " * (1 << 16)

    with served(model, max_request_chars=1000) as (address, _):
        headers = {"content-type": "application/json"}
        url = f"{address}/v1/chat/completions"
        refused = httpx.post(url, content=b" " * (1 << 20), headers=headers, timeout=30)
        assert refused.status_code == 413 and "bytes" in refused.json()["error"]["message"]
        with suppress(
            httpx.WriteError, httpx.RemoteProtocolError, httpx.ReadError
        ):  # the server may close the connection early
            # Without Content-Length the server has to count.
            assert httpx.post(url, content=body(), headers=headers, timeout=30).status_code == 413
        assert sent < 100 << 20
        assert ask(address).status_code == 200


def test_requests_need_the_api_key_if_one_is_set(model: Model) -> None:
    with served(model, api_key="sécret") as (address, _):
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Basic x"},
            {"authorization": ""},
            {"authorization": "Basic sécret".encode()},
            {"authorization": "bearer"},
        ):
            reply = httpx.get(f"{address}/v1/models", headers=headers)
            assert reply.status_code == 401 and reply.json()["error"]["type"] == "authentication_error"
            assert reply.headers["www-authenticate"] == "Bearer"
            assert httpx.get(f"{address}/metrics", headers=headers).status_code == 401
        for scheme in ("Bearer", "bearer", "BEARER", "Bearer "):  # the scheme's name is case-insensitive
            key = {"authorization": f"{scheme} sécret".encode()}
            assert httpx.get(f"{address}/v1/models", headers=key).status_code == 200, scheme
        assert httpx.get(f"{address}/").status_code == httpx.get(f"{address}/health").status_code == 200
        assert ask(address).status_code == 401


def test_full_queue_gets_429_with_retry_after(model: Model) -> None:
    with served(model, max_running=1, max_waiting=1) as (address, _):
        assert ask(address, n=3).status_code == 429
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=endless(), timeout=60) as first:
            lines = first.iter_lines()
            next(lines)
            with httpx.stream("POST", f"{address}/v1/chat/completions", json=endless(), timeout=60) as second:
                more = second.iter_lines()
                next(more)
                refused = ask(address)
                assert refused.status_code == 429 and refused.headers["retry-after"] == "2"
                assert refused.json()["error"]["type"] == "rate_limit_error"
        wait_until(lambda: model.batcher.rows == (0, 0))
        assert ask(address).status_code == 200


def endless(**fields: Any) -> dict[str, Any]:
    """A request that runs for seconds."""
    body = {"model": "tiny:base", "messages": [{"role": "user", "content": "kill"}], "max_tokens": 1900, "stream": True}
    return body | fields


@pytest.mark.parametrize("stream", [False, True])
def test_timeout_cuts_the_answer_off(model: Model, stream: bool) -> None:
    with served(model, timeout=0.3) as (address, _):
        reply = httpx.post(f"{address}/v1/chat/completions", json=endless(stream=stream), timeout=60)
        if stream:
            assert reply.status_code == 200 and "[DONE]" not in reply.text
            fault = json.loads(reply.text.strip().split("\n\n")[-1].removeprefix("data: "))
        else:
            assert reply.status_code == 504
            fault = reply.json()
        assert fault["error"]["message"] == "not finished within 0.3 s"
        wait_until(lambda: model.batcher.rows == (0, 0))


@pytest.mark.parametrize("stream", [False, True])
def test_client_disconnect_frees_the_slot_at_once(running: tuple[str, Server], model: Model, stream: bool) -> None:
    address, server = running
    before = model.batcher.tokens_computed
    if stream:
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=endless(), timeout=60) as reply:
            next(reply.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/v1/chat/completions", json=endless(stream=False), timeout=0.3)
    wait_until(lambda: model.batcher.rows == (0, 0))
    assert model.batcher.tokens_computed - before < 1900
    wait_until(lambda: not server.jobs._live)
    assert 'mote_requests_total{mode="base",status="499"}' in httpx.get(f"{address}/metrics").text


def test_slow_reader_does_not_block_other_requests(address: str) -> None:
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=endless(), timeout=60) as reply:
        lines = reply.iter_lines()
        next(lines)
        assert [ask(address).status_code for _ in range(3)] == [200] * 3


# --- health, metrics, shutdown


def test_health_and_metrics(address: str) -> None:
    def numbers() -> dict[str, float]:
        lines = httpx.get(f"{address}/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}

    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    before = numbers()
    usage = ask(address, mode="full").json()["usage"]
    after = numbers()

    def more(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert more('mote_requests_total{mode="full",status="200"}') == 1
    written = sum(more(f'mote_tokens_total{{mode="full",step="{s}"}}') for s in ("analysis", "guidance", "response"))
    assert written == usage["completion_tokens"]
    assert more("mote_prompt_tokens_total") == usage["prompt_tokens"]
    assert more("mote_request_seconds_count") == more("mote_first_token_seconds_count") == 1
    assert after["mote_rows_running"] == after["mote_rows_waiting"] == 0


def test_model_failure_gets_500_and_the_server_survives(model: Model, address: str) -> None:
    whole = ask(address).json()["choices"]
    forward = model.batcher._model
    model.batcher._model = None
    try:
        reply = ask(address)
    finally:
        model.batcher._model = forward
    assert reply.status_code == 500 and "NoneType" not in reply.text
    assert ask(address).json()["choices"] == whole


@pytest.mark.parametrize(("grace", "finishes"), [(20.0, True), (0.0, False)])
def test_shutdown_waits_for_grace_then_cuts_answers_off(model: Model, grace: float, finishes: bool) -> None:
    most = 200 if finishes else 1900
    with served(model, grace=grace) as (address, server):
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=endless(max_tokens=most), timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.should_exit = True
            rest = [line for line in lines if line]
        wait_until(lambda: not server.servers or not server.servers[0].is_serving())
        with pytest.raises(httpx.ConnectError):
            ask(address)
    if finishes:
        assert rest[-1] == "data: [DONE]" and server.jobs.cut == 0
    else:
        assert "was stopped before the answer was finished" in rest[-1] and server.jobs.cut == 1
