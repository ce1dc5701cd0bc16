"""The adaptive loop with a scripted model: its requests, their order, and the resulting chains."""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mote.chains.engine import Completion, Engine, Preference, Prompt
from mote.chains.judge import Judge
from mote.chains.make import make_chains
from mote.chains.prompts import as_text, check_prompt
from mote.chains.safety_check import ChoiceJudge, WordJudge
from mote.core.errors import MoteError
from mote.core.recipe import ChainSettings
from mote.core.records import ChainRow, Message, Question, read_rows
from mote.core.scheme import load_scheme
from mote.evals.judges.rule import RuleJudge

SCHEME = load_scheme("safety")


class Scripted:
    """Writes `stage for question`, judges an answer safe from a given depth on, and keeps every prompt."""

    name = "scripted"

    def __init__(self, safe_at: dict[str, int], finish: str = "stop", prompt_tokens: int | None = 100) -> None:
        self.safe_at = safe_at
        self.finish = finish
        self.prompt_tokens = prompt_tokens
        self.asked: list[Prompt] = []
        self.checks: dict[str, int] = {}
        self.now = self.most = 0  # requests at once

    async def write(self, prompt: Prompt) -> Completion:
        self.asked.append(prompt)
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0)
        self.now -= 1
        return Completion(f"text {len(self.asked)}", 7, self.finish, self.prompt_tokens)  # type: ignore[arg-type]

    async def choose(self, prompt: Prompt, choices: tuple[str, str]) -> Preference:
        assert choices == ("safe", "unsafe")
        name = next(name for name in self.safe_at if name in prompt.messages[-1].content)
        self.checks[name] = self.checks.get(name, 0) + 1
        return Preference(0.9 if self.checks[name] > self.safe_at[name] else 0.1, prompt_tokens=self.prompt_tokens)

    async def close(self) -> None:
        pass


def questions(*texts: str) -> list[Question]:
    return [Question(id=text, messages=(Message(role="user", content=text),), kind="harmful") for text in texts]


def settings(**changes: object) -> ChainSettings:
    return ChainSettings.model_validate({"retries": 0, "temperature": 0.5, "batch_size": 2, **changes})


def make(
    asked: Iterable[Question], engine: Any, path: Path, progress: Callable[[int], None] = lambda _: None, **changes: Any
) -> None:
    given = settings(**changes)
    judges: dict[str, Judge | None] = {
        "self": ChoiceJudge(engine, partial(check_prompt, SCHEME, settings=given, seed=0), "", "self"),
        "rule": RuleJudge(),
        "verdict": None,
    }
    asyncio.run(make_chains(asked, engine, judges[given.check], SCHEME, given, 0, path, progress))


def made(asked: Iterable[Question], engine: Engine, path: Path, **changes: object) -> list[ChainRow]:
    """The rows of these questions, in their order."""
    asked = list(asked)
    make(asked, engine, path, **changes)
    rows = {row.id: row for row in read_rows(path, ChainRow)}
    assert len(rows) == len(asked)
    return [rows[question.id] for question in asked]


def test_a_chain_is_as_deep_as_its_question_needs(tmp_path: Path) -> None:
    engine = Scripted({"easy": 0, "middle": 1, "hard": 2, "never": 9})
    rows = made(questions("easy", "middle", "hard", "never"), engine, tmp_path / "c.jsonl")
    chains = {row.id: [step.name for step in row.steps] for row in rows}
    assert chains == {
        "easy": ["response"],
        "middle": ["analysis", "response"],
        "hard": ["analysis", "guidance", "response"],
        "never": ["analysis", "guidance", "response"],
    }
    assert [row.safe for row in rows] == [True, True, True, False]
    assert [[c.depth for c in row.checks] for row in rows] == [
        ["direct"], ["direct", "analysis"], ["direct", "analysis", "full"], ["direct", "analysis", "full"]
    ]  # fmt: skip
    assert [c.score for c in rows[2].checks] == [0.1, 0.1, 0.9]
    # made: every generation; kept: those of the chain's steps
    assert [(row.tokens.made, row.tokens.kept) for row in rows] == [(7, 7), (21, 14), (35, 21), (35, 21)]
    assert [row.accepted for row in rows] == [True, True, True, False]
    assert [row.tokens.read for row in rows] == [200, 500, 800, 800]  # each prompt, and those of the checks


def test_prompt_tokens_may_be_unknown_and_exclude_other_judges(
    tmp_path: Path,
) -> None:
    assert (
        made(questions("hard"), Scripted({"hard": 2}, prompt_tokens=None), tmp_path / "c.jsonl")[0].tokens.read is None
    )
    engine = Scripted({"hard": 0})
    judge = WordJudge(Scripted({}), partial(check_prompt, SCHEME, settings=settings(), seed=0), "", "llm:other")
    given = settings(check="llm:other")
    asyncio.run(make_chains(questions("hard"), engine, judge, SCHEME, given, 0, tmp_path / "d.jsonl"))
    tokens = read_rows(tmp_path / "d.jsonl", ChainRow)[0].tokens
    assert (tokens.made, tokens.read) == (35, 500)


def test_each_stage_is_prompted_with_the_earlier_stages(tmp_path: Path) -> None:
    engine = Scripted({"hard": 2})
    row = made(questions("hard"), engine, tmp_path / "c.jsonl")[0]
    last = [prompt.messages[-1].content for prompt in engine.asked]
    analysis, guidance = (next(s.text for s in row.steps if s.name == name) for name in ("analysis", "guidance"))
    direct, ask_analysis, with_analysis, ask_guidance, with_both = last
    assert direct == "hard"
    assert "What does the person want" in ask_analysis
    assert analysis in with_analysis and guidance not in with_analysis
    assert analysis in ask_guidance and "How should the answer to this question be written" in ask_guidance
    assert analysis in with_both and guidance in with_both
    assert len({prompt.seed for prompt in engine.asked}) == 5


def test_worked_examples_are_turns_with_the_same_steps(tmp_path: Path) -> None:
    engine = Scripted({"hard": 2})
    made(questions("hard"), engine, tmp_path / "c.jsonl", examples=2)
    final = engine.asked[-1].messages
    assert [m.role for m in final] == ["user", "assistant"] * 2 + ["user"]
    example = SCHEME.examples[0]
    assert final[0].content.endswith(example.question) and example.steps["guidance"] in final[0].content
    assert final[1].content == example.steps["response"]


def test_a_dialogue_is_answered_as_turns_and_analysed_as_text(tmp_path: Path) -> None:
    turns = (("user", "first"), ("assistant", "second"), ("user", "hard"))
    messages = tuple(Message.model_validate({"role": role, "content": text}) for role, text in turns)
    engine = Scripted({"hard": 1})
    made([Question(id="q", messages=messages)], engine, tmp_path / "c.jsonl")
    assert engine.asked[0].messages == messages
    assert "User: first\nAssistant: second\nUser: hard" in engine.asked[1].messages[-1].content
    assert as_text(messages[:1]) == "first"


def test_a_broken_rule_is_resampled_and_then_rejected(tmp_path: Path) -> None:
    engine = Scripted({"easy": 0}, finish="length")
    row = made(questions("easy"), engine, tmp_path / "c.jsonl", retries=2)[0]
    assert row.rejected == "response: truncated" and row.safe and not row.accepted
    assert len(engine.asked) == 3
    kept = made(questions("easy"), engine, tmp_path / "d.jsonl", reject=[])[0]
    assert kept.rejected is None and kept.accepted


def test_an_unsafe_deepest_answer_is_resampled(tmp_path: Path) -> None:
    engine = Scripted({"hard": 4})
    row = made(questions("hard"), engine, tmp_path / "c.jsonl", retries=2)[0]
    assert row.safe and [c.depth for c in row.checks] == ["direct", "analysis", "full", "full", "full"]


def test_existing_rows_are_kept_and_not_requested_again(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    asked = questions("easy", "middle", "hard", "never", "last")
    plan = {"easy": 0, "middle": 1, "hard": 2, "never": 9, "last": 0}
    whole = made(asked, Scripted(plan), path, batch_size=1)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:40])  # killed while it wrote the third row
    engine = Scripted(plan)
    progress: list[int] = []
    make(asked, engine, path, progress.append)
    again = read_rows(path, ChainRow)
    assert again[:2] == whole[:2] and sorted(row.id for row in again) == sorted(row.id for row in whole)
    assert not any("easy" in prompt.messages[-1].content for prompt in engine.asked)
    assert progress == [3, 4, 5]


def test_batch_size_chains_are_in_flight_and_questions_are_lazy(tmp_path: Path) -> None:
    engine = Scripted({"q": 9})
    read = 0

    def endless() -> Iterator[Question]:
        nonlocal read
        for read in range(1, 21):
            assert read <= len(read_rows(tmp_path / "c.jsonl", ChainRow)) + 4  # three in flight, one at hand
            yield from questions(f"q{read}")

    make(endless(), engine, tmp_path / "c.jsonl", batch_size=3)
    assert engine.most == 3 and read == 20


def test_a_failing_engine_keeps_finished_rows(tmp_path: Path) -> None:
    class Failing(Scripted):
        async def write(self, prompt: Prompt) -> Completion:
            if "bad" in prompt.messages[-1].content:
                raise MoteError("engine: gone")
            return await super().write(prompt)

    engine = Failing({"one": 0, "two": 0, "bad": 0, "three": 0})
    with pytest.raises(MoteError, match="engine: gone"):
        made(questions("one", "two", "bad", "three"), engine, tmp_path / "c.jsonl", batch_size=1)
    assert [row.id for row in read_rows(tmp_path / "c.jsonl", ChainRow)] == ["one", "two"]


def test_the_seconds_of_all_chains_sum_to_the_wall_clock(tmp_path: Path) -> None:
    class Slow(Scripted):
        async def write(self, prompt: Prompt) -> Completion:
            await asyncio.sleep(0.02)
            return await super().write(prompt)

    began = time.monotonic()
    rows = made(questions("easy", "hard", "never"), Slow({"easy": 0, "hard": 2, "never": 9}), tmp_path / "c.jsonl")
    took = time.monotonic() - began
    assert 0.5 * took < sum(row.seconds for row in rows) <= took + 0.01
    assert rows[0].seconds < rows[2].seconds


@pytest.mark.parametrize(("kind", "safe"), [("harmful", False), ("benign", True)])
def test_the_refusal_rule_passes_refusals_and_benign_questions(kind: str, safe: bool, tmp_path: Path) -> None:
    question = questions("easy")[0].model_copy(update={"kind": kind})
    row = made([question], Scripted({"easy": 0}), tmp_path / "c.jsonl", check="rule")[0]
    assert row.safe is safe


def test_without_a_check_every_answer_is_accepted(tmp_path: Path) -> None:
    row = made(questions("never"), Scripted({"never": 9}), tmp_path / "c.jsonl", check="verdict")[0]
    assert row.safe and row.checks == () and [step.name for step in row.steps] == ["response"]


def test_an_unparsed_verdict_is_unsafe(tmp_path: Path) -> None:
    engine = Scripted({"hard": 0})
    judge = WordJudge(engine, partial(check_prompt, SCHEME, settings=settings(), seed=0), "", "verdict")
    asyncio.run(make_chains(questions("hard"), engine, judge, SCHEME, settings(), 0, tmp_path / "c.jsonl"))
    row = read_rows(tmp_path / "c.jsonl", ChainRow)[0]
    assert not row.safe and [check.score for check in row.checks] == [None] * 3  # it wrote `text 2`, not a verdict


def test_drafts_are_not_kept_in_the_chain(tmp_path: Path) -> None:
    scheme = load_scheme("critique-revise")
    engine = Scripted({})
    asyncio.run(make_chains(questions("hard"), engine, None, scheme, settings(), 0, tmp_path / "c.jsonl"))
    row = read_rows(tmp_path / "c.jsonl", ChainRow)[0]
    assert [step.name for step in row.steps] == ["response"] and row.accepted
    assert len(engine.asked) == 3 and "text 2" in engine.asked[-1].messages[-1].content
    assert (row.tokens.made, row.tokens.kept) == (21, 7)
