"""Answers from a trained model: the steps of a mode, or as many as the model chooses (section 3.2, figure 6)."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import mote.tuner.token_gated  # noqa: F401 (makes PEFT know their adapters)
from mote.core.errors import UserError
from mote.core.generation import GREEDY, Limits, Sampling
from mote.core.records import Answer, AnswerTokens, Check, Finish, Question, StepText
from mote.core.scheme import ADAPTIVE, BASE, CHECK, CHECKED, Chain, Scheme
from mote.core.seeds import seed_of
from mote.inference.batching import Batcher, Request
from mote.inference.events import Event, Events, Item, settle
from mote.inference.grammar import FreeText, OpenStep, StepGrammar, chains_within
from mote.inference.inputs import Input, as_questions
from mote.inference.self_check import SelfCheck, Verdicts
from mote.inference.separate import Steps, submit_steps
from mote.models.load import Base
from mote.tokens.encode import decode_steps, encode_choice, encode_prompt, special_ids
from mote.tokens.routing import Markers
from mote.tuner import MoteConfig


class Model:
    """A base model with a trained adapter; rows of all modes and lengths are written in one running batch.

    Without an adapter (`config` none) it has no mode but `base`.
    """

    def __init__(self, base: Base, model: Any, config: MoteConfig | None, scheme: Scheme, batch_size: int = 16) -> None:
        self.base, self.model, self.config, self.scheme = base, model, config, scheme
        self.experts: Chain = config.experts if config else ()
        self.markers = (config and config.routing) or Markers(starts=(), ends=())
        self.tokenizer = base.tokenizer
        self.batcher = Batcher(model, batch_size, self.markers if config else None)

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes it can answer in."""
        return self.scheme.modes_of(self.experts) if self.config else (BASE,)

    def answer(
        self,
        asked: Input | Sequence[Input],
        mode: str = "adaptive",
        *,
        max_step_tokens: int = 256,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 0.95,
        seed: int = 0,
        check_threshold: float = 0.5,
        system: str = "mote",
        on_event: Callable[[Event], None] | None = None,
    ) -> Any:
        """Answer one question or a list of them.

        Args:
            asked: A text, a message list, a `Question`, or a list of these.
            mode: `direct`, `analysis`, `full`, `adaptive` (the model chooses its steps), `adaptive+check` (and goes on
                to the next deeper chain while its trained check finds the answer unsafe) or `base` (adapter off).
            max_step_tokens: Budget of one step; it is then closed and the answer goes on.
            max_tokens: Budget in all; half of it is the answer's.
            temperature: 0 is greedy.
            top_p: Nucleus to sample from; sampling draws from `seed` and the question, whatever the batch.
            seed: Seed of the sampling.
            check_threshold: Least probability of a safe answer, in the mode `adaptive+check`.
            system: Name of the system in the answers.
            on_event: Called with every `Event` while a single question is answered.

        Returns:
            An `Answer`, or a list of them for a list.

        Raises:
            UserError: The mode is not one of the scheme's, or a question is not a dialogue that ends with the user.
        """
        questions, single = as_questions(asked)
        answers = self.answer_questions(
            questions,
            mode,
            Limits(max_step_tokens, max_tokens),
            Sampling(temperature, top_p, seed),
            check_threshold=check_threshold,
            system=system,
            on_event=on_event,
        )
        return answers[0] if single else answers

    def answer_questions(
        self,
        questions: Sequence[Question],
        mode: str,
        limits: Limits,
        sampling: Sampling = GREEDY,
        *,
        check_threshold: float = 0.5,
        system: str = "mote",
        on_event: Callable[[Event], None] | None = None,
    ) -> list[Answer]:
        """Answer questions in one running batch; the arguments are those of `answer`."""
        if on_event is not None and len(questions) != 1:
            raise UserError("answer: events are given for one question at a time")
        if not questions:
            return []
        began = time.monotonic()
        tokens: SimpleQueue[Item | None] = SimpleQueue()
        futures = [
            self.submit(
                question,
                mode,
                limits,
                sampling,
                check_threshold=check_threshold,
                on_token=tokens.put if on_event is not None else None,
            )
            for question in questions
        ]
        try:
            if on_event is not None:  # called in this thread: what it raises is the caller's
                futures[0].add_done_callback(lambda _: tokens.put(None))
                self._tell(tokens, on_event, self.events(mode))
            written = [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
        seconds = round((time.monotonic() - began) / len(questions), 3)
        return [
            self.read(question, items, mode, limits, system, seconds)
            for question, items in zip(questions, written, strict=True)
        ]

    def submit(
        self,
        question: Question,
        mode: str,
        limits: Limits,
        sampling: Sampling = GREEDY,
        *,
        check_threshold: float = 0.5,
        shared: bool = False,
        on_token: Callable[[Item], None] | None = None,
    ) -> "Future[list[Item]]":
        """Queue a question (`request`); its row joins the running batch.

        Returns:
            A future of what is written, for `read`; cancelling it ends the row.
        """
        request = self.request(
            question, mode, limits, sampling, check_threshold=check_threshold, shared=shared, on_token=on_token
        )
        if mode == BASE or self.config is None or not self.config.whole_rows:
            return self.batcher.submit(request)
        return submit_steps(self.batcher, self._apart(request, self._chains(mode), limits))

    def request(
        self,
        question: Question,
        mode: str,
        limits: Limits,
        sampling: Sampling = GREEDY,
        *,
        check_threshold: float = 0.5,
        shared: bool = False,
        on_token: Callable[[Item], None] | None = None,
    ) -> Request:
        """A question as the batcher takes it.

        Args:
            question: To be answered.
            mode: As for `answer`.
            limits: Budgets.
            sampling: Its seed is mixed with the question's id.
            check_threshold: As for `answer`.
            shared: The same question is asked in other modes about now: it is read once for all that use the adapter.
            on_token: Called with each token and each verdict, in the batch's thread; it must not raise.

        Raises:
            UserError: The mode is not one of the scheme's or needs an adapter.
        """
        eos = self.tokenizer.eos_token_id
        if mode == BASE:
            most = limits.max_tokens or limits.max_step_tokens
            grammar: Any = FreeText(eos, [*self.markers.starts, *self.markers.ends])
        else:
            chains = self._chains(mode)
            steps = max(map(len, chains))
            most = steps * (limits.max_step_tokens + 2)
            if limits.max_tokens is not None:
                most = min(most, limits.max_tokens)
            grammar = self._grammar(chains, limits)
        ids = encode_prompt(self.tokenizer, question.messages)
        request = Request(
            ids,
            grammar,
            most,
            shared=len(ids) - 1 if shared else 0,
            sampling=replace(sampling, seed=seed_of(sampling.seed, question.id)),
            adapted=mode != BASE,
            on_token=on_token,
        )
        if mode == CHECKED:
            depths = {depth: self._chains(depth)[0] for depth in self.scheme.depths}
            within = chains_within(list(depths.values()), limits.max_tokens)
            depths = {depth: chain for depth, chain in depths.items() if chain in within}
            SelfCheck(
                request, depths, lambda depth: self._grammar([depths[depth]], limits), self.markers,
                self._verdicts(check_threshold),
            )  # fmt: skip
        return request

    def _grammar(self, chains: Sequence[tuple[int, ...]], limits: Limits) -> StepGrammar:
        special, eos = special_ids(self.tokenizer), self.tokenizer.eos_token_id
        return StepGrammar(chains, self.markers, special, eos, 0, limits.max_step_tokens, limits.max_tokens)

    def _verdicts(self, threshold: float) -> Verdicts:
        """How the trained check's verdict is read.

        Raises:
            UserError: The tokenizer cannot tell the scheme's words apart.
        """
        words = self.scheme.verdicts
        if (found := encode_choice(self.tokenizer, words)) is None:
            raise UserError(
                f"check: in the tokens of {self.base.name} one of {words} is the beginning of the other; train with "
                "other words (`verdicts` of the scheme)"
            )
        return Verdicts(self.markers.starts[self.experts.index(CHECK)], *found, words, threshold)

    def _chains(self, mode: str) -> list[tuple[int, ...]]:
        """The chains of a mode, as indices of the steps.

        Raises:
            UserError: The mode is not one of the model's, or there is no adapter.
        """
        if self.config is None:
            raise UserError(f"mode: '{mode}' needs a trained adapter; give one, or use the mode 'base'")
        self.scheme.check_mode(mode, self.experts)
        return [tuple(self.experts.index(step) for step in chain) for chain in self.scheme.chains_of(mode)]

    def _apart(self, request: Request, chains: Sequence[tuple[int, ...]], limits: Limits) -> Steps:
        """The steps of a chain for a model each; half of a budget in all is the answer's, as in `StepGrammar`."""
        if len(chains) > 1:
            raise UserError(
                "mode: a model for each step has none that chooses the steps; use one of "
                f"{[mode for mode in self.scheme.modes if mode not in (BASE, ADAPTIVE)]}"
            )
        chain, special, most = chains[0], special_ids(self.tokenizer), limits.max_tokens
        grammars = [OpenStep([(s,)], self.markers, special, self.tokenizer.eos_token_id, 0, 0) for s in chain]
        each = limits.max_step_tokens
        if most is None:
            return Steps(request, grammars, [lambda _: each] * len(chain))
        reasoning = max(1, min(each, most // 2 // max(1, len(chain) - 1) - 2))
        budgets = [lambda _: reasoning] * (len(chain) - 1)
        return Steps(request, grammars, [*budgets, lambda written: min(each, most - written - 2)])

    def read(
        self,
        question: Question,
        items: Sequence[Item],
        mode: str,
        limits: Limits,
        system: str = "mote",
        seconds: float = 0.0,
    ) -> Answer:
        """What was written as an `Answer`."""
        name, settled = self.scheme.answer, settle(items, self.markers)
        ids, checks = settled.ids, settled.checks
        if mode == BASE:
            text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
            steps, counts = [StepText(name=name, text=text)], {name: len(ids)}
            finish: Finish = "stop" if ids and ids[-1] == self.tokenizer.eos_token_id else "length"
        else:
            steps = decode_steps(self.tokenizer, ids, self.markers, self.experts)
            counts = step_lengths(ids, self.markers, self.experts)
            over = limits.max_tokens is not None and len(ids) >= limits.max_tokens
            finish = "length" if over or counts.get(name, 0) >= limits.max_step_tokens + 2 else "stop"
            counts |= {CHECK: len(checks)} if checks else {}
        return Answer(
            **question.model_dump(),
            system=system,
            mode=mode,
            steps=tuple(steps),
            answer=next((step.text for step in steps if step.name == name), ""),
            finish=finish,
            tokens=AnswerTokens(steps=counts, total=len(items), dropped=settled.dropped),
            seconds=seconds,
            safe=checks[-1][0].safe if checks else None,
            checks=tuple(
                Check(
                    depth=checked.depth,
                    answer=decode_steps(self.tokenizer, answer, self.markers, self.experts)[0].text,
                    safe=checked.safe,
                    score=checked.score,
                )
                for checked, answer in checks
            ),
        )

    def events(self, mode: str) -> Events:
        """Turns what is written of one answer in this mode into events."""
        return Events(self.tokenizer, self.markers, self.experts, self.scheme.answer, checks=mode == CHECKED)

    def _tell(self, tokens: "SimpleQueue[Item | None]", on_event: Callable[[Event], None], events: Events) -> None:
        while (item := tokens.get()) is not None:
            for event in events.token(item):
                on_event(event)
        for event in events.end():
            on_event(event)


def step_lengths(ids: Sequence[int], markers: Markers, experts: Chain) -> dict[str, int]:
    """Tokens of each step, its markers included."""
    counts: dict[str, int] = {}
    name = ""
    for id_ in ids:
        if id_ in markers.starts:
            name = experts[markers.starts.index(id_)]
        if name:
            counts[name] = counts.get(name, 0) + 1
    return counts
