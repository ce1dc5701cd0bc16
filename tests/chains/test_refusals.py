"""Requests that a server refuses, over real HTTP: their chains are rejected, unless all are refused."""

import asyncio
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.chains import made
from support.fake_server import FakeServer

from mote.chains.engine import Refused
from mote.chains.make import make_chain, make_chains
from mote.chains.prompts import check_prompt
from mote.chains.refusals import FIRST, Refusals
from mote.chains.safety_check import ChoiceJudge
from mote.chains.stats import chain_stats
from mote.core.errors import UserError
from mote.core.recipe import ChainSettings
from mote.core.records import ChainRow, Message, Question, read_rows
from mote.core.scheme import load_scheme
from mote.inference.engines.server import ServerEngine

SCHEME = load_scheme("safety")
LONG = "How do I write it? " * 200
CONTEXT = 3000  # characters that the server takes: the long question is above, a short one with its check below


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with FakeServer() as server:
        server.longest = CONTEXT
        yield server


def question(name: str, text: str) -> Question:
    return Question(id=name, messages=(Message(role="user", content=text),))


def short(count: int) -> list[Question]:
    return [question(f"short-{i}", f"How do I cook {i} eggs?") for i in range(count)]


def long(count: int) -> list[Question]:
    return [question(f"long-{i}", f"{LONG} {i}") for i in range(count)]


def make(
    fake: FakeServer, asked: list[Question], path: Path, batch_size: int = 4, beside: Callable[[], Any] | None = None
) -> dict[str, ChainRow]:
    """The rows that are in the file then."""

    async def main() -> None:
        engine = ServerEngine(fake.address, "some-model", retries=0)
        settings = ChainSettings(batch_size=batch_size, retries=0)
        judge = ChoiceJudge(engine, partial(check_prompt, SCHEME, settings=settings, seed=0), "", "self")
        try:
            work = make_chains(asked, engine, judge, SCHEME, settings, 0, path)
            await (asyncio.gather(work, beside()) if beside else work)
        finally:
            await engine.close()

    asyncio.run(main())
    return {row.id: row for row in read_rows(path, ChainRow)}


def test_a_refused_question_is_rejected_and_the_run_continues(
    fake: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make(fake, [*long(2), *short(5), *long(4)[2:]], tmp_path / "chains.jsonl")
    assert len(rows) == 9
    refused = {name: row for name, row in rows.items() if "long" in name}
    assert {row.rejected for row in refused.values()} == {"response: refused"} and len(refused) == 4
    for row in refused.values():
        assert [(step.name, step.text) for step in row.steps] == [("response", "")] and not row.safe
        assert (row.tokens.made, row.tokens.kept, row.tokens.read) == (0, 0, 0)
    assert all(row.accepted for name, row in rows.items() if "short" in name)
    assert chain_stats(tmp_path / "chains.jsonl").reasons == {"response: refused": 4}
    said = capsys.readouterr().err
    assert said.count("refuses a request (400: more than 3000 characters)") == 1 and said.count("\n") == 1


def test_a_refused_check_rejects_the_chain(fake: FakeServer, tmp_path: Path) -> None:
    nearly = question("nearly", "How do I cook an egg? " * 100)  # twice in the prompt of the check
    rows = make(fake, [*short(1), nearly], tmp_path / "chains.jsonl")
    row = rows["nearly"]
    assert row.rejected == "check: refused" and row.checks == () and row.steps[0].text and row.tokens.made == 5
    assert rows["short-0"].accepted


@pytest.mark.parametrize("count", [3, 400])
def test_a_run_in_which_all_are_refused_stops_early(fake: FakeServer, tmp_path: Path, count: int) -> None:
    with pytest.raises(UserError) as found:
        make(fake, long(count), tmp_path / "chains.jsonl")
    text = str(found.value)
    tried = min(count, FIRST + 3)
    assert text.startswith(f"chains: the first {tried} were all refused, and none is written; engine: {fake.address}")
    assert "400: more than 3000 characters" in text and "chains.max_tokens" in text and "\n" not in text
    assert fake.refused == tried and not (tmp_path / "chains.jsonl").exists()


def test_a_server_that_refuses_only_checks_is_reported(fake: FakeServer, tmp_path: Path) -> None:
    fake.longest = 60
    with pytest.raises(UserError, match=rf"the first {FIRST + 3} were all refused"):
        make(fake, short(400), tmp_path / "chains.jsonl")
    assert len(fake.seen) < FIRST + 8


@pytest.mark.parametrize(
    ("how", "complaint"),
    [("401", "refuses the key"), ("404", "does not serve model='some-model'"), ("402", "refuses to work")],
)
def test_a_wrong_key_or_name_stops_at_once(fake: FakeServer, tmp_path: Path, how: str, complaint: str) -> None:
    fake.usual = how
    with pytest.raises(UserError, match=complaint):
        make(fake, short(400), tmp_path / "chains.jsonl")
    assert len(fake.seen) <= 8


def test_early_refusals_do_not_stop_the_run(fake: FakeServer, tmp_path: Path) -> None:
    """The two short questions are answered only after all that can be refused meanwhile was refused."""
    fake.usual = "wait"

    async def release() -> None:
        while fake.refused < FIRST + 1 or fake.in_flight < 2:
            await asyncio.sleep(0.001)
        assert not (tmp_path / "chains.jsonl").exists()
        fake.release()

    rows = make(fake, [*short(2), *long(60)], tmp_path / "chains.jsonl", beside=release)
    assert len(rows) == 62 and sum(row.rejected is not None for row in rows.values()) == 60


def test_all_remaining_questions_of_a_run_may_be_refused(fake: FakeServer, tmp_path: Path) -> None:
    make(fake, short(3), tmp_path / "chains.jsonl")
    rows = make(fake, [*short(3), *long(2)], tmp_path / "chains.jsonl")
    assert sorted(rows) == ["long-0", "long-1", "short-0", "short-1", "short-2"]
    before = fake.refused
    make(fake, [*short(3), *long(2)], tmp_path / "chains.jsonl")
    assert fake.refused == before


def test_a_single_chain_raises_its_refusal(fake: FakeServer) -> None:
    async def main() -> None:
        engine = ServerEngine(fake.address, "some-model")
        try:
            await make_chain(long(1)[0], engine, None, SCHEME, ChainSettings(), 0)
        finally:
            await engine.close()

    with pytest.raises(Refused, match="400: more than 3000 characters"):
        asyncio.run(main())


def test_held_rows_are_written_after_the_first_success() -> None:
    refusals = Refusals(batch_size=2, resumed=False)
    row = made("a", "How?", response="")
    why = Refused("no")
    for _ in range(FIRST - 1):
        assert refusals.done(row, why) == ([], 1)
    assert refusals.done(row, why) == ([], 0)
    rows, free_slots = refusals.done(row, None)
    assert len(rows) == FIRST + 1 and free_slots == 2
    assert refusals.done(row, why) == ([row], 1) and refusals.remaining() == []
