"""Questions -> reasoning chains: the adaptive loop of section 3.1.

Before each stage the model answers with what it has so far and the answer is checked; as soon as it is judged safe the
remaining stages are skipped. This module knows nothing of how the model is run.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from jinja2.sandbox import ImmutableSandboxedEnvironment

from mote.config import ChainSettings
from mote.engines import Completion, Engine, Prompt
from mote.quality import fault
from mote.records import ChainRow, ChainTokens, Check, Message, Question, StepText, append_rows, read_rows
from mote.refusal import refuses
from mote.seeds import seed_of
from mote.steps import Scheme

SAFE, UNSAFE = "safe", "unsafe"

_TEMPLATES = ImmutableSandboxedEnvironment(autoescape=False)


class _Draft:
    """A chain in the making."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.texts: dict[str, str] = {}
        self.faults: dict[str, str] = {}
        self.tokens: dict[str, int] = {}
        self.checks: list[Check] = []
        self.chain: tuple[str, ...] = ()
        self.made = 0

    @property
    def safe(self) -> bool:
        return bool(self.checks) and self.checks[-1].safe


def make_chains(
    questions: Sequence[Question],
    engine: Engine,
    scheme: Scheme,
    settings: ChainSettings,
    seed: int,
    path: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[ChainRow]:
    """Make the chains of all questions, appending them to `path` as they are done; rows that are there are kept.

    Questions are worked on in fixed groups of `settings.batch_size` and every request has a seed of its own, so a run
    that was cut ends with the same rows.

    Args:
        questions: What to make chains for.
        engine: The model that is aligned (it writes all stages itself).
        scheme: Steps and prompts.
        settings: The loop's settings.
        seed: Seed of the run.
        path: The JSONL file of the chains.
        progress: Called with rows done and rows in all.

    Returns:
        All rows of the file that belong to the questions, in the questions' order.
    """
    there = {row.id for row in read_rows(path, ChainRow)} & {question.id for question in questions}
    done = len(there)
    for start in range(0, len(questions), settings.batch_size):
        group = [question for question in questions[start : start + settings.batch_size] if question.id not in there]
        if group:
            append_rows(path, _Loop(engine, scheme, settings, seed).run(group))
            done += len(group)
            progress(done, len(questions))
    rows = {row.id: row for row in read_rows(path, ChainRow)}
    return [rows[question.id] for question in questions]


class _Loop:
    """The adaptive loop over one group of questions."""

    def __init__(self, engine: Engine, scheme: Scheme, settings: ChainSettings, seed: int) -> None:
        self.engine, self.scheme, self.settings, self.seed = engine, scheme, settings, seed
        self.templates = {stage: _TEMPLATES.from_string(text) for stage, text in scheme.templates.items()}
        self.examples = scheme.examples[: settings.examples]

    def run(self, questions: Sequence[Question]) -> list[ChainRow]:
        began = time.monotonic()
        drafts = [_Draft(question) for question in questions]
        deepest = list(self.scheme.depths)[-1]
        for depth, chain in self.scheme.depths.items():
            open_ = [draft for draft in drafts if not draft.safe]
            for draft in open_:
                draft.chain = chain
            for step in chain:
                missing = [draft for draft in open_ if step == self.scheme.answer or step not in draft.texts]
                self._write(missing, step, depth)
            self._check(open_, depth)
            for sample in range(self.settings.retries if depth == deepest else 0):
                again = [draft for draft in open_ if not draft.safe]
                self._write(again, self.scheme.answer, f"{depth}/{sample + 1}")
                self._check(again, depth)
        seconds = (time.monotonic() - began) / len(drafts)
        return [self._row(draft, round(seconds, 3)) for draft in drafts]

    def _write(self, drafts: list[_Draft], step: str, where: str) -> None:
        """Write a step of each draft; what breaks a quality rule is written anew, `retries` times."""
        for attempt in range(1 + self.settings.retries):
            if not drafts:
                return
            done = self.engine.write([self._prompt(draft, step, f"{where}/{attempt}") for draft in drafts])
            for draft, completion in zip(drafts, done, strict=True):
                self._take(draft, step, completion)
            drafts = [draft for draft in drafts if step in draft.faults]
            if not self.settings.temperature:
                return  # greedy would only say the same again

    def _take(self, draft: _Draft, step: str, completion: Completion) -> None:
        draft.texts[step] = completion.text
        draft.tokens[step] = completion.tokens
        draft.made += completion.tokens
        draft.faults.pop(step, None)
        examples = [example.steps[step] for example in self.scheme.examples if step in example.steps]
        if step == self.scheme.answer:  # an answer may use the words of its question and of its guidance
            found = fault(completion, examples)
        else:
            found = fault(completion, [*examples, self.scheme.templates[step]])
        if found in self.settings.reject:
            draft.faults[step] = found

    def _check(self, drafts: list[_Draft], depth: str) -> None:
        """Safety Checking, p(c|y,x): judge each draft's answer."""
        if not drafts:
            return
        answers = [draft.texts[self.scheme.answer] for draft in drafts]
        if self.settings.check == "rule":
            scores = [
                float(refuses(answer) or draft.question.kind == "benign")
                for draft, answer in zip(drafts, answers, strict=True)
            ]
        else:
            prompts = [self._check_prompt(draft, answer) for draft, answer in zip(drafts, answers, strict=True)]
            scores = self.engine.choose(prompts, (SAFE, UNSAFE))
        for draft, answer, score in zip(drafts, answers, scores, strict=True):
            safe = score >= self.settings.threshold
            draft.checks.append(Check(depth=depth, answer=answer, safe=safe, score=round(score, 4)))

    def _prompt(self, draft: _Draft, step: str, where: str) -> Prompt:
        question = draft.question
        known = {name: draft.texts[name] for name in draft.chain if name in draft.texts and name != step}
        turns = self._turns(step, known)
        if step == self.scheme.answer:
            turns += question.messages[:-1]  # the answer goes on with the dialogue itself
        turns.append(self._user(step, question.messages, known))
        return Prompt(
            messages=tuple(turns),
            max_tokens=self.settings.max_tokens,
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            seed=seed_of(self.seed, question.id, step, where),
        )

    def _check_prompt(self, draft: _Draft, answer: str) -> Prompt:
        turns = self._system()
        for example in self.examples:
            asked = (Message(role="user", content=example.question),)
            pairs = [(example.steps[self.scheme.answer], SAFE), (example.unsafe_answer, UNSAFE)]
            for text, verdict in pairs:
                if text is not None:
                    turns.append(self._user("check", asked, {"answer": text}))
                    turns.append(Message(role="assistant", content=verdict))
        turns.append(self._user("check", draft.question.messages, {"answer": answer}))
        return Prompt(messages=tuple(turns), max_tokens=4, seed=self.seed)

    def _turns(self, step: str, known: dict[str, str]) -> list[Message]:
        """System prompt and worked examples, each as a turn of its own that shows what the known steps show."""
        turns = self._system()
        for example in self.examples:
            shown = {name: example.steps[name] for name in known if name in example.steps}
            turns.append(self._user(step, (Message(role="user", content=example.question),), shown))
            turns.append(Message(role="assistant", content=example.steps[step]))
        return turns

    def _system(self) -> list[Message]:
        return [Message(role="system", content=self.scheme.system)] if self.scheme.system else []

    def _user(self, stage: str, messages: Sequence[Message], known: dict[str, str]) -> Message:
        text = self.templates[stage].render(question=as_text(messages), last=messages[-1].content, **known)
        return Message(role="user", content=text)

    def _row(self, draft: _Draft, seconds: float) -> ChainRow:
        faults = [f"{step}: {draft.faults[step]}" for step in draft.chain if step in draft.faults]
        return ChainRow(
            **draft.question.model_dump(),
            steps=tuple(StepText(name=step, text=draft.texts[step]) for step in draft.chain),
            safe=draft.safe,
            rejected=faults[0] if faults else None,
            checks=tuple(draft.checks),
            model=self.engine.name,
            prompts=self.scheme.sha256,
            seed=self.seed,
            tokens=ChainTokens(made=draft.made, kept=sum(draft.tokens[step] for step in draft.chain)),
            seconds=seconds,
        )


def as_text(messages: Sequence[Message]) -> str:
    """A dialogue as text: the question itself where there is one turn, else each turn behind its speaker."""
    if len(messages) == 1:
        return messages[0].content
    return "\n".join(f"{message.role.capitalize()}: {message.content}" for message in messages)
