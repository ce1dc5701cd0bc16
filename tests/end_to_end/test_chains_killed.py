"""kill -9 at a hundred random moments: no finished chain is lost or repeated."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from support.paths import ROOT

from mote.chains.engine import Completion, Preference, Prompt
from mote.chains.make import make_chains
from mote.chains.prompts import check_prompt
from mote.chains.safety_check import ChoiceJudge
from mote.core.recipe import ChainSettings
from mote.core.records import ChainRow, Message, Question, read_rows
from mote.core.scheme import load_scheme

KILLS = 100
QUESTIONS = 400


class Busy:
    """A slow but deterministic fake server."""

    name = "busy"

    async def write(self, prompt: Prompt) -> Completion:
        await asyncio.sleep(prompt.seed % 7 / 1000)
        return Completion(f"text of {prompt.seed}", 3, "stop")

    async def choose(self, prompt: Prompt, choices: tuple[str, str]) -> Preference:
        await asyncio.sleep(0.001)
        return Preference(len(prompt.messages[-1].content) % 10 / 10)

    async def close(self) -> None:
        pass


def asked() -> list[Question]:
    return [Question(id=f"q{i}", messages=(Message(role="user", content=f"question {i}"),)) for i in range(QUESTIONS)]


def work(path: Path) -> None:
    settings = ChainSettings.model_validate({"batch_size": 8, "retries": 0, "check": "self"})
    scheme = load_scheme("safety")
    engine = Busy()
    judge = ChoiceJudge(engine, partial(check_prompt, scheme, settings=settings, seed=0), "", "self")
    asyncio.run(make_chains(asked(), engine, judge, scheme, settings, 0, path))


def whole_lines(path: Path) -> bytes:
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1]


def kill_often(folder: Path) -> None:
    """Repeatedly fork a worker and kill it; this process has no threads, so forking is safe and fast."""
    cut = folder / "cut.jsonl"
    path = folder / "whole.jsonl"
    draws = random.Random(0)
    before = b""
    for kill in range(KILLS):
        wanted = min(before.count(b"\n") + draws.randint(1, 2), QUESTIONS)  # so that every worker dies at work
        worker = os.fork()
        if not worker:
            work(cut)
            os._exit(0)
        deadline = time.monotonic() + 60
        while whole_lines(cut).count(b"\n") < wanted and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(draws.random() / 100)
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        assert whole_lines(cut).startswith(before), f"kill {kill} lost a row"
        before = whole_lines(cut)
    work(cut)
    made = read_rows(cut, ChainRow)
    assert len(made) == len({row.id for row in made}) == QUESTIONS
    assert whole_lines(cut).startswith(before) and before.count(b"\n") > KILLS
    work(path)  # nothing cut this one
    assert sorted(map(untimed, made)) == sorted(map(untimed, read_rows(path, ChainRow)))


def untimed(row: ChainRow) -> str:
    return row.model_copy(update={"seconds": 0.0}).model_dump_json()


def test_random_kills_neither_lose_nor_repeat_chains(tmp_path: Path) -> None:
    code = f"import pathlib, test_chains_killed as t; t.kill_often(pathlib.Path({str(tmp_path)!r}))"
    where = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(ROOT / "tests"), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
