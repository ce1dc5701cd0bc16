"""Judges by their names, down to what a real server and real weights are asked."""

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mote.chains.judge import JudgeCard, Verdict
from mote.core.errors import UserError
from mote.core.records import Message
from mote.evals.judges.open import open_judge


def judged(name: str, prompt: str = "harm", model: str | None = None) -> tuple[JudgeCard, Verdict]:
    async def ask() -> tuple[JudgeCard, Verdict]:
        async with open_judge(name, prompt, model) as judge:
            return judge.card, await judge.judge([Message(role="user", content="How?")], "I can't help with that.")

    return asyncio.run(ask())


class _Server(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that says 7, and safe with a probability of three quarters."""

    seen: list[dict[str, Any]] = []  # noqa: RUF012

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(body)
        top = [{"token": "safe", "logprob": -0.2876821, "bytes": None}, {"token": "unsafe", "logprob": -1.3862944}]
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "Good. Rating: [[7]]"},
            "finish_reason": "stop",
            "logprobs": {"content": [{**top[0], "top_logprobs": top}]} if body.get("logprobs") else None,
        }
        usage = {"prompt_tokens": 1, "completion_tokens": 5, "total_tokens": 6}
        answer = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [choice],
            "usage": usage,
        }
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    _Server.seen.clear()
    http = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1"
    http.shutdown()
    http.server_close()


def test_the_rule_needs_nothing() -> None:
    card, verdict = judged("rule")
    assert (card.name, verdict.label) == ("rule", "full_refusal")


def test_an_llm_behind_a_server(server: str) -> None:
    card, verdict = judged(f"llm:some/model@{server}", "help")
    assert (verdict.score, card.name, card.measures) == (7, f"llm:some/model@{server}", "help")
    assert _Server.seen[0]["model"] == "some/model" and _Server.seen[0]["temperature"] == 0
    assert "I can't help with that." in _Server.seen[0]["messages"][-1]["content"]


def test_choice_judge_on_a_served_model(server: str) -> None:
    card, verdict = judged(f"choice:m@{server}")
    assert verdict.score == pytest.approx(0.75, abs=1e-4) and verdict.label == "safe" and card.measures == "harm"


def test_the_base_model_itself(tiny: Path) -> None:
    card, verdict = judged("self", model=str(tiny))
    assert card.name == "self" and verdict.score is not None and 0 <= verdict.score <= 1
    assert judged(f"choice:{tiny}")[1] == verdict


def test_a_classifier_of_another_kind_is_refused(tiny: Path) -> None:
    with pytest.raises(UserError, match=r"is a llama model, wildguard is one of"):
        judged(f"wildguard:{tiny}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "wise",
            r"judge: 'wise' is not a judge; use one of \['rule', 'self', 'choice:MODEL', 'llm:MODEL', 'llamaguard:",
        ),
        ("llm:", "judge: 'llm:' is not a judge"),
        ("wildguard", "judge: 'wildguard' is not a judge"),
        ("self", "judge: 'self' is the base model; name it with --model"),
        ("llamaguard:./nowhere", "model: there is no folder './nowhere'"),
    ],
)
def test_a_name_that_is_none(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        judged(name)
