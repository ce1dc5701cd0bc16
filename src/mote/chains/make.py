"""Questions -> reasoning chains: the adaptive loop of section 3.1.

The model answers with the steps it has so far, the answer is checked, and as soon as it is judged safe the remaining
steps are skipped. Many chains are in flight at once, each one a coroutine of straight code. This module knows nothing
about how the model is run.
"""

import asyncio
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mote.chains.engine import Completion, Engine, Refused
from mote.chains.judge import FULL_REFUSAL, PARTIAL_REFUSAL, SAFE, Judge, QuestionJudge
from mote.chains.prompts import stage_prompt
from mote.chains.quality import broken_rule
from mote.chains.question_categories import Categories
from mote.chains.refusals import Refusals
from mote.core.errors import UserError
from mote.core.generation import seed_of
from mote.core.recipe import ChainSettings
from mote.core.records import ChainRow, ChainTokens, Check, Question, StepText, append_rows, iter_rows
from mote.core.scheme import CHECK, Chain, Scheme


async def make_chains(
    questions: Iterable[Question],
    engine: Engine,
    judge: Judge | QuestionJudge | None,
    scheme: Scheme,
    settings: ChainSettings,
    seed: int,
    path: Path,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Make the chains of all questions and append each to `path` when it is done; existing rows are kept.

    Questions are consumed lazily with at most `settings.batch_size` chains in flight; rows are written in completion
    order. Each request has its own seed, so an interrupted run ends with the same rows.

    Args:
        questions: Questions to make chains for.
        engine: The model that is aligned; it generates all stages itself.
        judge: Safety Checking of the answers; None accepts every answer.
        scheme: Steps and prompts.
        settings: The loop's settings.
        seed: Seed of the run.
        path: The JSONL file of the chains.
        progress: Called with the number of rows in the file.

    Raises:
        MoteError: The engine or the judge failed, or the disk is full; finished rows are in the file.
        UserError: The engine refuses every question.
    """
    loop = _Loop(engine, judge, scheme, settings, seed)
    existing = {row.id for row in iter_rows(path, ChainRow)}
    slots = asyncio.Semaphore(settings.batch_size)
    clock = _Clock()
    refusals = Refusals(settings.batch_size, resumed=bool(existing))
    done = len(existing)

    def write(rows: Sequence[ChainRow]) -> None:
        nonlocal done
        if rows:
            append_rows(path, rows)
            done += len(rows)
            progress(done)

    async def make(question: Question) -> None:
        with clock.in_flight() as seconds:
            row, refused = await loop.chain(question)
        rows, free_slots = refusals.done(row.model_copy(update={"seconds": round(seconds(), 3)}), refused)
        write(rows)
        for _ in range(free_slots):
            slots.release()

    try:
        async with asyncio.TaskGroup() as chains:
            for question in questions:
                if question.id not in existing:
                    await slots.acquire()
                    chains.create_task(make(question))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None  # the other chains were cancelled with it
    write(refusals.remaining())


async def make_chain(
    question: Question,
    engine: Engine,
    judge: Judge | QuestionJudge | None,
    scheme: Scheme,
    settings: ChainSettings,
    seed: int,
) -> ChainRow:
    """The chain of one question, by the same loop; no file is written and `seconds` is 0.

    Raises:
        Refused: The engine or the judge refuses a request.
    """
    row, refused = await _Loop(engine, judge, scheme, settings, seed).chain(question)
    if refused is not None:
        raise refused
    return row


def _tried_depths(scheme: Scheme, settings: ChainSettings) -> dict[str, Chain]:
    """The depths of the scheme that `chains.depths` names, in the scheme's order; all if it names none.

    Raises:
        UserError: The scheme has no such depth.
    """
    unknown = [depth for depth in settings.depths if depth not in scheme.depths]
    if unknown:
        raise UserError(
            f"recipe: chains.depths={list(settings.depths)}: the scheme '{scheme.name}' has no depth {unknown}; use "
            f"some of {list(scheme.depths)}"
        )
    return {depth: chain for depth, chain in scheme.depths.items() if not settings.depths or depth in settings.depths}


class _Clock:
    """Wall-clock time, split evenly among the chains in flight."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._share = 0.0  # seconds of a chain in flight since the start
        self._chains = 0

    @contextmanager
    def in_flight(self) -> Iterator[Callable[[], float]]:
        """Count a chain as in flight; yields a function that gives its seconds afterwards."""
        start = self._advance(1)
        seconds = 0.0
        try:
            yield lambda: seconds
        finally:
            seconds = self._advance(-1) - start

    def _advance(self, change: int) -> float:
        now = time.monotonic()
        self._share += (now - self._last) / max(self._chains, 1)
        self._last = now
        self._chains += change
        return self._share


class _Draft:
    """The state of a chain in flight."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.category: str | None = None  # None if the scheme has none
        self.texts: dict[str, str] = {}
        self.broken_rules: dict[str, str] = {}
        self.tokens: dict[str, int] = {}
        self.checks: list[Check] = []
        self.current = ""  # stage of the pending request
        self.chain: Chain = ()  # steps of this depth
        self.stages: Chain = ()  # stages generated for them
        self.generated_tokens = 0
        self.prompt_tokens: int | None = 0
        self.safe = False

    def spend(self, generated: int, prompt: int | None) -> None:
        """Add the tokens of a request; one with unknown prompt tokens makes the sum unknown."""
        self.generated_tokens += generated
        self.prompt_tokens = None if self.prompt_tokens is None or prompt is None else self.prompt_tokens + prompt


class _Loop:
    """The adaptive loop over one question."""

    def __init__(
        self,
        engine: Engine,
        judge: Judge | QuestionJudge | None,
        scheme: Scheme,
        settings: ChainSettings,
        seed: int,
    ) -> None:
        self.engine = engine
        self.judge = judge
        self.scheme = scheme
        self.settings = settings
        self.seed = seed
        self.prompts = scheme.prompts_hash(settings.examples)
        self.categories = Categories(scheme, engine) if scheme.categories else None
        self.depths = _tried_depths(scheme, settings)

    async def chain(self, question: Question) -> tuple[ChainRow, Refused | None]:
        """The chain, and the error if the engine or the judge refused a request; the chain is then rejected."""
        draft = _Draft(question)
        try:
            if await self._categorise(draft):
                await self._deepen(draft)
        except Refused as refused:
            return self._row(draft, f"{draft.current}: refused"), refused
        broken = [step for step in ("question", *draft.chain) if step in draft.broken_rules]
        return self._row(draft, f"{broken[0]}: {draft.broken_rules[broken[0]]}" if broken else None), None

    async def _deepen(self, draft: _Draft) -> None:
        """Answer and check at each depth until an answer is safe; resample at the deepest (section 3.1)."""
        for depth, chain in self._depths_of(draft):
            draft.chain = chain
            draft.stages = self.scheme.stages_of(depth)
            for step in draft.stages:
                if step == self.scheme.answer or step not in draft.texts:
                    await self._generate(draft, step, depth)
            await self._check(draft, depth)
            if draft.safe:
                break
        for sample in range(self.settings.retries):
            if draft.safe:
                break
            await self._generate(draft, self.scheme.answer, f"{depth}/{sample + 1}")
            await self._check(draft, depth)

    def _depths_of(self, draft: _Draft) -> list[tuple[str, Chain]]:
        """The depths that are tried for the draft's question: all, or the deepest alone where its category says so."""
        depths = list(self.depths.items())
        deepest = self.scheme.categories[draft.category].deepest if draft.category is not None else None
        return depths if deepest is None or not re.search(deepest, draft.question.source) else depths[-1:]

    async def _categorise(self, draft: _Draft) -> bool:
        """Find the question's category; False if it is unsure and nothing is to be generated."""
        if self.categories is None:
            return True
        if self.scheme.infers_categories:
            draft.category, sure, prompt_tokens = await self.categories.category_of(draft.question.messages)
            draft.spend(0, prompt_tokens)
        else:
            sure = draft.question.kind in self.scheme.categories
            draft.category = draft.question.kind if sure else None
        if sure or "unsure" not in self.settings.reject:
            return True
        draft.broken_rules["question"] = "unsure"
        return False

    async def _generate(self, draft: _Draft, step: str, where: str) -> None:
        """Generate a step; a text that breaks a quality rule is resampled up to `retries` times."""
        draft.current = step
        earlier = draft.stages[: draft.stages.index(step)]  # an answer of a shorter chain is not among them
        for attempt in range(1 + self.settings.retries):
            known = {name: draft.texts[name] for name in earlier if name in draft.texts}
            seed = seed_of(self.seed, draft.question.id, step, f"{where}/{attempt}")
            prompt = stage_prompt(
                self.scheme, step, draft.question.messages, known, self.settings, seed, draft.category, draft.stages
            )
            self._accept(draft, step, await self.engine.write(prompt))
            if step not in draft.broken_rules or not self.settings.temperature:  # greedy decoding would repeat it
                return

    def _accept(self, draft: _Draft, step: str, completion: Completion) -> None:
        draft.texts[step] = completion.text
        draft.tokens[step] = completion.tokens
        draft.spend(completion.tokens, completion.prompt_tokens)
        draft.broken_rules.pop(step, None)
        closed = draft.category is not None and step in self.scheme.categories[draft.category].closed
        # A closed step repeats the form of its examples; its category has a rule about its words.
        examples = [] if closed else [e.steps[step] for e in self.scheme.examples if step in e.steps]
        # The answer may use the words of its template, which holds the question and the guidance.
        instructions = [] if step == self.scheme.answer else [self.scheme.templates[step]]
        # Only earlier steps that are kept: a revision may repeat its draft.
        before = [draft.texts[name] for name in draft.stages[: draft.stages.index(step)] if name in draft.chain]
        asked = [message.content for message in draft.question.messages if message.role != "system"]
        found = broken_rule(
            completion,
            [*examples, *instructions],
            question=asked,
            earlier=before,
            labels=self.scheme.steps,
            instructions=instructions,
        )
        if found not in self.settings.reject and self.categories is not None and draft.category is not None:
            found = self.categories.broken_rule(draft.category, step, completion.text, draft.question.messages, before)
        if found in self.settings.reject:
            draft.broken_rules[step] = found

    async def _check(self, draft: _Draft, depth: str) -> None:
        """Safety Checking, p(c|y,x): judge the draft's answer; without a judge every answer is accepted."""
        if self.judge is None:
            draft.safe = True
            return
        draft.current = CHECK
        answer = draft.texts[self.scheme.answer]
        if isinstance(self.judge, QuestionJudge):
            broken_rule = draft.broken_rules.get(self.scheme.answer)
            verdict = await self.judge.judge_question(draft.question, answer, broken_rule)
        else:
            verdict = await self.judge.judge(draft.question.messages, answer)
        if self.settings.checks_itself:
            draft.spend(verdict.tokens, verdict.prompt_tokens)
        if self.judge.card.measures == "refusal":  # a smoke test: refusal says nothing about harm
            draft.safe = verdict.label in (PARTIAL_REFUSAL, FULL_REFUSAL) or draft.question.kind == "benign"
        else:
            draft.safe = verdict.label == SAFE  # an unparsed verdict passes nothing
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
                made=draft.generated_tokens,
                kept=sum(draft.tokens.get(step, 0) for step in draft.chain),
                read=draft.prompt_tokens,
            ),
            seconds=0.0,  # set by make_chains
        )
