"""The server engine against real HTTP servers that are slow, flaky, malformed, or die."""

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from email.utils import formatdate
from typing import Any, TypeVar

import pytest
from support.fake_server import FakeServer

from mote.chains.engine import Prompt
from mote.core.errors import MoteError, UserError
from mote.core.recipe_file import load_recipe
from mote.core.records import Message
from mote.inference.engines import endpoints, server
from mote.inference.engines.endpoints import Endpoints, backoff
from mote.inference.engines.server import ServerEngine

Result = TypeVar("Result")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "FIRST_WAIT", 0.004)
    monkeypatch.setattr(endpoints, "_POLL", 0.001)
    monkeypatch.setattr(server, "LOADING_WAIT", 0.002)


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


def prompt(text: str, **changes: Any) -> Prompt:
    shared = (Message(role="user", content="how do I answer"), Message(role="assistant", content="analysis"))
    given: dict[str, Any] = {"messages": (*shared, Message(role="user", content=text)), "max_tokens": 12}
    return Prompt(**{**given, **changes})


def with_engine(
    servers: FakeServer | list[FakeServer], work: Callable[[ServerEngine], Awaitable[Result]], **changes: Any
) -> Result:
    """What `work` makes of an engine on the servers."""
    addresses = ", ".join(one.address for one in (servers if isinstance(servers, list) else [servers]))

    async def main() -> Result:
        engine = ServerEngine(addresses, "some-model", **changes)
        try:
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(main())


def write(servers: FakeServer | list[FakeServer], texts: list[str], **changes: Any) -> list[str]:
    """The completions' texts of all prompts, asked at once."""

    async def work(engine: ServerEngine) -> list[str]:
        return [done.text for done in await asyncio.gather(*(engine.write(prompt(text)) for text in texts))]

    return with_engine(servers, work, **changes)


def asked(*servers: FakeServer) -> Counter[str]:
    """How often each prompt arrived."""
    return Counter(body["messages"][-1]["content"] for server in servers for body in server.seen)


TEXTS = [f"question {i}" for i in range(20)]
ANSWERS = [f"about {text}" for text in TEXTS]


def test_request_body_follows_the_prompt(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    done = with_engine(fake, lambda engine: engine.write(prompt("one", temperature=0.5, top_p=0.9, seed=2**31 + 3)))
    assert (done.text, done.tokens, done.finish, done.prompt_tokens) == ("about one", 5, "stop", 1)
    assert fake.seen == [
        {
            "model": "some-model", "temperature": 0.5, "top_p": 0.9, "seed": 3, "max_tokens": 12,
            "messages": [{"role": "user", "content": "how do I answer"}, {"role": "assistant", "content": "analysis"},
                         {"role": "user", "content": "one"}],
        }
    ]  # fmt: skip
    assert fake.keys == ["Bearer secret"]


@pytest.mark.parametrize(
    ("how", "text", "tokens", "finish"),
    [("length", "about one", 5, "length"), ("no usage", "about one", 0, "stop"), ("null", "", 5, "stop"),
     ("text", "about one", 5, "stop")],
)  # fmt: skip
def test_replies_with_missing_fields_are_accepted(
    fake: FakeServer, how: str, text: str, tokens: int, finish: str
) -> None:
    fake.usual = how
    done = with_engine(fake, lambda engine: engine.write(prompt("one")))
    assert (done.text, done.tokens, done.finish) == (text, tokens, finish)
    assert done.prompt_tokens == (None if how == "no usage" else 1)
    assert len(fake.seen) == 1


@pytest.mark.parametrize(
    "how", ["500", "502", "408", "429", "429 0.01", "503 0.01", "reset", "truncated", "garbage", "not json", "html",
            "no choices"],
)  # fmt: skip
def test_only_transient_errors_are_retried(fake: FakeServer, how: str) -> None:
    fake.plan.extend(["ok", how, how, "ok"])
    assert write(fake, TEXTS) == ANSWERS
    assert sum(asked(fake).values()) == len(TEXTS) + 2
    assert set(asked(fake)) == set(TEXTS)


def test_flaky_server_loses_no_request(fake: FakeServer) -> None:
    stumbles = ["reset", "429", "html", "503", "truncated", "not json"]
    fake.plan.extend(["ok", *stumbles, "ok", "ok"] * 6)
    assert write(fake, TEXTS * 3, concurrency=8, retries=100) == ANSWERS * 3
    assert not fake.plan
    assert sum(asked(fake).values()) == 3 * len(TEXTS) + 6 * len(stumbles)


@pytest.mark.parametrize(
    ("how", "reason"),
    [("503", "503: behaves as 503"), ("html", "its reply is no chat completion"),
     ("truncated", "payload is not completed"), ("reset", "payload is not completed"), ("garbage", "Bad status line")],
)  # fmt: skip
def test_broken_server_is_named_with_the_remedy(fake: FakeServer, how: str, reason: str) -> None:
    fake.usual = how
    with pytest.raises(MoteError) as found:
        write(fake, ["one"], retries=2)
    text = str(found.value)
    assert fake.address in text and reason in text and "'some-model'" in text and "finished rows are kept" in text
    assert "\n" not in text and found.value.exit_code == 1
    assert len(fake.seen) == 3


def test_unreachable_address_is_named(fake: FakeServer) -> None:
    fake.die()
    with pytest.raises(MoteError, match=rf"engine: {fake.address} failed \(.*[Cc]onnect.*finished rows are kept"):
        write(fake, TEXTS, retries=1)


@pytest.mark.parametrize(
    ("how", "complaint"),
    [("400", r"refuses a request \(400: behaves as 400\).*chains\.max_tokens"),
     ("401", r"refuses the key \(401: behaves as 401\); set OPENAI_API_KEY"),
     ("404", r"does not serve model='some-model' \(404: .*; it serves 'this', 'that'")],
)  # fmt: skip
def test_refused_request_is_not_retried(fake: FakeServer, how: str, complaint: str) -> None:
    fake.usual = how
    fake.models = ("this", "that")
    with pytest.raises(UserError, match=f"engine: {fake.address} {complaint}"):
        write(fake, ["one"])
    assert len(fake.seen) == 1


def test_address_without_v1_path_is_explained(fake: FakeServer) -> None:
    async def main() -> None:
        engine = ServerEngine(fake.address.removesuffix("/v1"), "some-model")
        try:
            await engine.write(prompt("one"))
        finally:
            await engine.close()

    with pytest.raises(UserError, match=r"404: .*Not Found.*give the address ending in /v1"):
        asyncio.run(main())


def test_retry_after_in_seconds_and_as_a_date(fake: FakeServer) -> None:
    fake.plan.append("429 0.3")

    async def timed(engine: ServerEngine) -> float:
        began = asyncio.get_running_loop().time()
        await engine.write(prompt("one"))
        return asyncio.get_running_loop().time() - began

    assert with_engine(fake, timed, retries=0) >= 0.3
    fake.plan.append(f"503 {formatdate(0, usegmt=True)}")  # long ago
    assert with_engine(fake, timed, retries=0) < 60
    assert len(fake.seen) == 4


def test_server_busy_beyond_the_timeout_is_named(fake: FakeServer) -> None:
    fake.plan.append("429 3600")
    with pytest.raises(MoteError, match=r"failed \(429: behaves as 429\)"):
        write(fake, ["one"], timeout=60)
    assert len(fake.seen) == 1


def test_busy_replies_do_not_use_retries(fake: FakeServer) -> None:
    fake.plan.extend(["429 0"] * 10)
    assert write(fake, ["one"], retries=0) == ["about one"]


def test_server_that_loads_its_model_is_waited_for(fake: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    fake.plan.extend(["loading"] * 40)  # five retries would give up
    assert write(fake, TEXTS) == ANSWERS
    assert capsys.readouterr().err.splitlines() == [
        f"engine: {fake.address} still loads its model (503: Loading model); waiting for it",
        f"engine: {fake.address} has loaded its model",
    ]


def test_server_that_never_loads_its_model_is_named(fake: FakeServer) -> None:
    fake.usual = "loading"
    with pytest.raises(MoteError, match=rf"engine: {fake.address} failed \(503: Loading model\); see that the server"):
        write(fake, ["one"], timeout=1, retries=0)
    assert len(fake.seen) > 3


def test_hanging_server_hits_the_timeout(fake: FakeServer) -> None:
    fake.plan.append("wait")
    assert write(fake, ["one"], timeout=0.3) == ["about one"]
    assert len(fake.seen) == 2
    fake.usual = "wait"
    with pytest.raises(MoteError, match=r"no answer within 0.1 s"):
        write(fake, ["one"], timeout=0.1, retries=1)


def test_concurrency_is_used_up_to_its_bound(fake: FakeServer) -> None:
    fake.usual = "wait"

    async def work(engine: ServerEngine) -> int:
        tasks = [asyncio.create_task(engine.write(prompt(text))) for text in TEXTS]
        while fake.in_flight < 7:
            await asyncio.sleep(0.001)
        fake.release()
        return len(await asyncio.gather(*tasks))

    assert with_engine(fake, work, concurrency=7) == len(TEXTS)
    assert fake.most_in_flight == 7
    assert max(asked(fake).values()) == 1


def test_several_servers_share_the_requests() -> None:
    with FakeServer("wait") as one, FakeServer("wait") as two:

        async def work(engine: ServerEngine) -> None:
            tasks = [asyncio.create_task(engine.write(prompt(text))) for text in TEXTS]
            while one.in_flight + two.in_flight < 10:
                await asyncio.sleep(0.001)
            assert one.in_flight == two.in_flight == 5
            one.release()
            two.release()
            await asyncio.gather(*tasks)

        with_engine([one, two], work, concurrency=10)
        assert sorted(asked(one, two)) == sorted(TEXTS) and max(asked(one, two).values()) == 1


def test_requests_of_a_dead_server_move_to_another(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer("wait") as dying, FakeServer() as other:

        async def work(engine: ServerEngine) -> list[str]:
            tasks = [asyncio.create_task(engine.write(prompt(text))) for text in TEXTS]
            while not (dying.in_flight == 5 and len(other.seen) == 15):
                await asyncio.sleep(0.001)
            dying.die()
            first = [done.text for done in await asyncio.gather(*tasks)]
            return first + [(await engine.write(prompt(text))).text for text in TEXTS]

        assert with_engine([dying, other], work, concurrency=10) == ANSWERS * 2
        held = len(dying.seen)
        assert held == 5  # none of those it had not begun went to it
        assert sum(asked(other).values()) == 2 * len(TEXTS)
        dying.start()
    said = capsys.readouterr().err
    assert f"engine: {dying.address} is set aside (" in said and said.count("set aside") == 1


def test_recovered_server_is_used_again(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as back, FakeServer() as other:
        back.die()

        async def work(engine: ServerEngine) -> int:
            await asyncio.gather(*(engine.write(prompt(text)) for text in TEXTS))
            assert not back.seen
            back.start()
            rounds = 0
            while not back.seen:
                await asyncio.gather(engine.write(prompt("more")), engine.write(prompt("more")))
                rounds += 1
            return rounds

        rounds = with_engine([back, other], work)
        assert len(back.seen) + len(other.seen) == len(TEXTS) + 2 * rounds
    assert f"engine: {back.address} answers again" in capsys.readouterr().err


def test_all_servers_dead_is_one_error_naming_them() -> None:
    with FakeServer() as one, FakeServer() as two:
        one.die()
        two.die()
        with pytest.raises(MoteError, match=rf"engine: {one.address} and {two.address} failed"):
            write([one, two], TEXTS, retries=2)
        one.start()
        two.start()


def test_set_aside_endpoint_gets_one_request_at_a_time() -> None:
    async def main() -> None:
        both = Endpoints(["a", "b"], retries=5)
        first, second = both.all
        for _ in range(3):
            both.failed(first, asyncio.get_running_loop().time(), "reason")
        first.rests_until = 0.0
        taken = [await both.take([]) for _ in range(5)]
        assert taken.count(first) == 1 and taken.count(second) == 4

    asyncio.run(main())


def test_failures_begun_before_set_aside_do_not_count() -> None:
    async def main() -> None:
        alone = Endpoints(["a"], retries=5)
        began = asyncio.get_running_loop().time()
        await asyncio.sleep(0.001)
        for _ in range(100):
            alone.failed(alone.all[0], began, "reason")
        assert alone.all[0].strikes == 3

    asyncio.run(main())


def test_backoff_grows_to_a_limit_with_jitter() -> None:
    waits = [[backoff(failures) for _ in range(50)] for failures in (0, 3, 40)]
    assert all(len(set(row)) > 40 for row in waits)
    for row, longest in zip(waits, (0.004, 0.032, endpoints.LONGEST_WAIT), strict=True):
        assert longest / 2 <= min(row) and max(row) <= longest


@pytest.mark.parametrize(
    ("how", "choices", "score"),
    [("ok", ("safe", "unsafe"), math.exp(-0.1) / (math.exp(-0.1) + math.exp(-2.0))),
     ("ok", ("about", "unsafe"), 0.0), ("no logprobs", ("safe", "unsafe"), None),
     ("no logprobs", ("about", "unsafe"), 1.0), ("no logprobs", ("safe", "about"), 0.0),
     ("thinks", ("safe", "unsafe"), None)],
)  # fmt: skip
def test_choose_uses_log_probabilities_or_the_word(
    fake: FakeServer, how: str, choices: tuple[str, str], score: float | None
) -> None:
    fake.usual = how
    found = with_engine(fake, lambda engine: engine.choose(prompt("one"), choices))
    assert found.score == (None if score is None else pytest.approx(score, abs=1e-6))
    assert (found.tokens, found.prompt_tokens) == (5, 1)
    assert fake.seen[0]["logprobs"] is True and fake.seen[0]["top_logprobs"] == 20
    assert len(fake.seen) == 1


def test_a_recipe_names_several_addresses() -> None:
    recipe = load_recipe(None, ["engine=http://one:8000/v1, https://two/v1"])
    assert recipe.engine.split(",") == ["http://one:8000/v1", "https://two/v1"]
    assert load_recipe(None, ["engine=vllm"]).engine == "vllm"
    for wrong in ("http://one:8000/v1,", "http://one:8000/v1 http://two/v1", "one:8000/v1", "http://"):
        with pytest.raises(UserError, match=r"recipe: engine=.*: use 'transformers', 'llamacpp', 'vllm', or addr"):
            load_recipe(None, [f"engine={wrong}"])
