"""Questions -> reasoning chains: the adaptive loop of section 3.1.

Before each stage the model answers with what it has so far and the answer is checked; as soon as it is judged safe the
remaining stages are skipped. Many chains are in the making at once, each as straight code. This module knows nothing of
how the model is run.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mote.chains.engine import Completion, Engine, Refused
from mote.chains.judge import FULL_REFUSAL, PARTIAL_REFUSAL, SAFE, Judge
from mote.chains.prompts import stage_prompt
from mote.chains.quality import fault
from mote.chains.question_categories import Categories
from mote.chains.refusals import Refusals
from mote.core.recipe import ChainSettings
from mote.core.records import ChainRow, ChainTokens, Check, Question, StepText, append_rows, iter_rows
from mote.core.scheme import CHECK, Chain, Scheme
from mote.core.seeds import seed_of


async def make_chains(
    questions: Iterable[Question],
    engine: Engine,
    judge: Judge | None,
    scheme: Scheme,
    settings: ChainSettings,
    seed: int,
    path: Path,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Make the chains of all questions, appending each to `path` as it is done; rows that are there are kept.

    Questions are read as they are needed and `settings.batch_size` chains are in the making at once, so that rows stand
    in no particular order. Every request has a seed of its own: a run that was cut ends with the same rows, as far as
    the engine's arithmetic allows.

    Args:
        questions: What to make chains for.
        engine: The model that is aligned (it writes all stages itself).
        judge: Checks the answers (Safety Checking); without one every answer is taken.
        scheme: Steps and prompts.
        settings: The loop's settings.
        seed: Seed of the run.
        path: The JSONL file of the chains.
        progress: Called with the number of rows that are on the disk.

    Raises:
        MoteError: The engine or the judge failed, or the disk is full; the rows that were done are in the file.
        UserError: The engine refuses all questions.
    """
    loop, there = _Loop(engine, judge, scheme, settings, seed), {row.id for row in iter_rows(path, ChainRow)}
    room, clock = asyncio.Semaphore(settings.batch_size), _Clock()
    refusals, written = Refusals(settings.batch_size, made=bool(there)), len(there)

    def write(rows: Sequence[ChainRow]) -> None:
        nonlocal written
        if not rows:
            return
        append_rows(path, rows)
        written += len(rows)
        progress(written)

    async def make(question: Question) -> None:
        with clock.share() as seconds:
            row, refused = await loop.chain(question)
        rows, places = refusals.done(row.model_copy(update={"seconds": round(seconds(), 3)}), refused)
        write(rows)
        for _ in range(places):
            room.release()

    missing = (question for question in questions if question.id not in there)
    try:
        async with asyncio.TaskGroup() as chains:
            for question in missing:
                await room.acquire()
                chains.create_task(make(question))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None  # the other chains were cancelled with it
    write(refusals.rest())


async def make_chain(
    question: Question, engine: Engine, judge: Judge | None, scheme: Scheme, settings: ChainSettings, seed: int
) -> ChainRow:
    """The chain of one question, by the same loop; nothing is written and `seconds` is 0.

    Raises:
        Refused: The engine or the judge refuses a request.
    """
    row, refused = await _Loop(engine, judge, scheme, settings, seed).chain(question)
    if refused is not None:
        raise refused
    return row


class _Clock:
    """Time that is shared out: of each second, one n-th to each of the n chains in the making."""

    def __init__(self) -> None:
        self._now, self._shared, self._chains = time.monotonic(), 0.0, 0

    @contextmanager
    def share(self) -> Iterator[Callable[[], float]]:
        """A chain is in the making; gives a function that says its seconds when it is done."""
        begin = self._turn(1)
        taken = [0.0]
        try:
            yield lambda: taken[0]
        finally:
            taken[0] = self._turn(-1) - begin

    def _turn(self, change: int) -> float:
        now = time.monotonic()
        self._shared += (now - self._now) / max(self._chains, 1)
        self._now, self._chains = now, self._chains + change
        return self._shared


class _Draft:
    """A chain in the making."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.category: str | None = None  # None if the scheme has none
        self.texts: dict[str, str] = {}
        self.faults: dict[str, str] = {}
        self.tokens: dict[str, int] = {}
        self.checks: list[Check] = []
        self.at = ""  # the step that is asked for
        self.chain: Chain = ()  # the steps that are kept
        self.stages: Chain = ()  # what is written for them
        self.made = 0
        self.read: int | None = 0
        self.safe = False

    def spend(self, written: int, read: int | None) -> None:
        """Tokens of one request more; once a request does not say what it read, nothing is known of all."""
        self.made += written
        self.read = None if self.read is None or read is None else self.read + read


class _Loop:
    """The adaptive loop over one question."""

    def __init__(self, engine: Engine, judge: Judge | None, scheme: Scheme, settings: ChainSettings, seed: int) -> None:
        self.engine, self.judge, self.scheme, self.settings, self.seed = engine, judge, scheme, settings, seed
        self.prompts = scheme.prompts_hash(settings.examples)
        self.categories = Categories(scheme, engine) if scheme.categories else None

    async def chain(self, question: Question) -> tuple[ChainRow, Refused | None]:
        """The chain, rejected where the engine or the judge refused a request for it."""
        draft = _Draft(question)
        try:
            if await self._sort(draft):
                await self._deepen(draft)
        except Refused as refused:
            return self._row(draft, f"{draft.at}: refused"), refused
        faults = [f"{step}: {draft.faults[step]}" for step in ("question", *draft.chain) if step in draft.faults]
        return self._row(draft, faults[0] if faults else None), None

    async def _deepen(self, draft: _Draft) -> None:
        """Answer and check at each depth until an answer is safe; at the deepest, further samples are tried."""
        for depth, chain in self.scheme.depths.items():
            draft.chain, draft.stages = chain, self.scheme.stages_of(depth)
            for step in draft.stages:
                if step == self.scheme.answer or step not in draft.texts:
                    await self._write(draft, step, depth)
            await self._check(draft, depth)
            if draft.safe:
                break
        for sample in range(self.settings.retries):
            if draft.safe:
                break
            await self._write(draft, self.scheme.answer, f"{depth}/{sample + 1}")
            await self._check(draft, depth)

    async def _sort(self, draft: _Draft) -> bool:
        """Find the question's category; False if it is unsure and nothing is to be generated."""
        if self.categories is None:
            return True
        draft.category, sure, read = await self.categories.category_of(draft.question.messages)
        draft.spend(0, read)
        if sure or "unsure" not in self.settings.reject:
            return True
        draft.faults["question"] = "unsure"
        return False

    async def _write(self, draft: _Draft, step: str, where: str) -> None:
        """Write a step; what breaks a quality rule is written anew, `retries` times."""
        draft.at = step
        for attempt in range(1 + self.settings.retries):
            known = {name: draft.texts[name] for name in draft.stages if name in draft.texts and name != step}
            seed = seed_of(self.seed, draft.question.id, step, f"{where}/{attempt}")
            prompt = stage_prompt(
                self.scheme, step, draft.question.messages, known, self.settings, seed, draft.category
            )
            self._take(draft, step, await self.engine.write(prompt))
            if step not in draft.faults or not self.settings.temperature:  # greedy would only say the same again
                return

    def _take(self, draft: _Draft, step: str, completion: Completion) -> None:
        draft.texts[step] = completion.text
        draft.tokens[step] = completion.tokens
        draft.spend(completion.tokens, completion.read)
        draft.faults.pop(step, None)
        closed = draft.category is not None and step in self.scheme.categories[draft.category].closed
        # A closed step repeats the form of its examples; that its words are the question's is a rule of its category.
        examples = [] if closed else [e.steps[step] for e in self.scheme.examples if step in e.steps]
        # An answer may use the words of its question and of its guidance.
        own = [] if step == self.scheme.answer else [self.scheme.templates[step]]
        # A revision may repeat its draft.
        before = [draft.texts[name] for name in draft.stages[: draft.stages.index(step)] if name in draft.chain]
        asked = [message.content for message in draft.question.messages if message.role != "system"]
        found = fault(
            completion, [*examples, *own], question=asked, earlier=before, labels=self.scheme.steps, instructions=own
        )
        if found not in self.settings.reject and self.categories is not None and draft.category is not None:
            found = self.categories.fault(draft.category, step, completion.text, draft.question.messages, before)
        if found in self.settings.reject:
            draft.faults[step] = found

    async def _check(self, draft: _Draft, depth: str) -> None:
        """Safety Checking, p(c|y,x): judge the draft's answer. Without a check every answer is taken."""
        if self.judge is None:
            draft.safe = True
            return
        draft.at, answer = CHECK, draft.texts[self.scheme.answer]
        verdict = await self.judge.judge(draft.question.messages, answer)
        if self.settings.checks_itself:
            draft.spend(verdict.written, verdict.read)
        if self.judge.card.measures == "refusal":  # for smoke runs: it knows nothing of harm
            draft.safe = verdict.label in (PARTIAL_REFUSAL, FULL_REFUSAL) or draft.question.kind == "benign"
        else:
            draft.safe = verdict.label == SAFE  # a verdict that cannot be read lets nothing pass
        score = None if verdict.score is None else round(verdict.score, 4)
        draft.checks.append(Check(depth=depth, answer=answer, safe=draft.safe, score=score))

    def _row(self, draft: _Draft, rejected: str | None) -> ChainRow:
        return ChainRow(
            **draft.question.model_dump(),
            steps=tuple(StepText(name=step, text=draft.texts.get(step, "")) for step in draft.chain),
            safe=draft.safe,
            rejected=rejected,
            checks=tuple(draft.checks),
            model=self.engine.name,
            prompts=self.prompts,
            seed=self.seed,
            tokens=ChainTokens(
                made=draft.made, kept=sum(draft.tokens.get(step, 0) for step in draft.chain), read=draft.read
            ),
            seconds=0.0,  # known when it is done
        )
