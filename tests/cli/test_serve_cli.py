"""The command `mote serve`, and the commands in its docs page."""

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import processes
from support.adapters import save_random_adapter
from support.commands import Fails
from support.docs import blocks
from support.paths import ROOT
from support.servers import ask, served, wait_until

import mote

PAGE = ROOT / "docs" / "serving.md"


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_adapter(tiny, tmp_path_factory.mktemp("adapter"))


@contextlib.contextmanager
def command(log: Path, *arguments: object) -> Iterator[tuple[str, Any]]:
    """A running `mote serve`: its address and its process."""
    process = processes.start(["serve", *map(str, arguments), "--port", "0"], log)
    try:
        wait_until(lambda: (log.exists() and "(API)" in log.read_text()) or not process.is_alive(), processes.LONGEST)
        found = re.search(r"at (http://\S+) \(chat page\)", log.read_text())
        assert found, log.read_text()
        address = found[1].replace("0.0.0.0", "127.0.0.1")
        wait_until(lambda: _answers(address))
        yield address, process
    finally:
        process.kill()
        process.join()


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health").status_code == 200
    except httpx.ConnectError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_finishes_answers_and_exits_cleanly(
    tiny: Path, adapter: Path, tmp_path: Path, number: signal.Signals
) -> None:
    log = tmp_path / "log"
    settings = ("answer.max_step_tokens=5", "answer.temperature=0")
    with command(log, "--model", tiny, "--adapter", adapter, "--name", "tiny", *settings) as (address, process):
        body = {"model": "tiny:base", "messages": [{"role": "user", "content": "kill"}], "max_tokens": 150,
                "stream": True}  # fmt: skip
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            os.kill(process.pid, number)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        process.join(60)
        assert process.exitcode == 0
    assert log.read_text().splitlines()[-1] == "mote: stopped; no answers cut off"


def test_public_address_without_a_key_warns(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret\n")
    given = ("--model", tiny, "--adapter", adapter, "--host", "0.0.0.0")
    with command(tmp_path / "open", *given) as (address, _):
        assert httpx.get(f"{address}/v1/models").status_code == 200
    assert "mote: warning: anyone who can reach 0.0.0.0 can use the model" in (tmp_path / "open").read_text()
    with command(tmp_path / "closed", *given, "--api-key-file", key) as (address, _):
        assert ask(address).status_code == 401
        assert httpx.get(f"{address}/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
    assert "warning" not in (tmp_path / "closed").read_text() and "secret" not in (tmp_path / "closed").read_text()


def test_unservable_setups_fail_at_once(fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = fails("serve", "--adapter", "nowhere", "--port", port)
        assert message.startswith(f"port: 127.0.0.1:{port} cannot be listened on (Address already in use)")
    assert "give the folder of a trained adapter" in fails("serve")
    assert "one without a colon" in fails("serve", "--adapter", "x", "--name", "a:b")
    assert "not both" in fails("serve", "--adapter", "x", "--api-key-env", "A", "--api-key-file", "b")
    monkeypatch.setenv("EMPTY_KEY", " ")
    assert "$EMPTY_KEY holds no key" in fails("serve", "--adapter", "x", "--api-key-env", "EMPTY_KEY")
    missing = tmp_path / "no"
    assert f"{missing} cannot be read" in fails("serve", "--adapter", "x", "--api-key-file", missing)


def test_commands_in_the_docs_run(tiny: Path, adapter: Path) -> None:
    model = mote.load(str(tiny), adapter, device="cpu")
    shell = [block for runs, block in blocks(PAGE, "bash") if runs]
    python = [block for runs, block in blocks(PAGE, "python") if runs]
    assert len(shell) == 3 and len(python) == 2
    with served(model, name="my-model") as (address, _):
        listed, whole, streamed = (
            subprocess.run(
                ["bash", "-c", block.replace("http://127.0.0.1:8000", address)],
                capture_output=True, text=True, check=True, timeout=60,
            ).stdout
            for block in shell
        )  # fmt: skip
        names: dict[str, Any] = {}
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            for block in python:
                exec(block.replace("http://127.0.0.1:8000", address), names)
        names["client"].close()
    assert json.loads(listed)["data"][0]["id"] == "my-model"
    assert list(json.loads(whole)["choices"][0]["mote"]["steps"]) == ["analysis", "response"]
    assert streamed.endswith("data: [DONE]\n\n")
    assert names["message"].content in said.getvalue()


def test_transcript_in_the_docs_matches_a_reply(tiny: Path, adapter: Path) -> None:
    model = mote.load(str(tiny), adapter, device="cpu")
    (shown,) = [json.loads(block) for _, block in blocks(PAGE, "json")]
    with served(model) as (address, _):
        real = ask(address, mode="analysis").json()

    def shape(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shape(inner) for key, inner in value.items() if key != "steps"}
        return [shape(inner) for inner in value] if isinstance(value, list) else type(value).__name__

    assert shape(shown) == shape(real)
