"""Answers of a trained model, in the steps of a mode or as many as the model chooses (section 3.2, figure 6)."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import mote.tuner.token_gated  # noqa: F401 (registers their adapters with PEFT)
from mote.core.errors import UserError
from mote.core.generation import GREEDY, Limits, Sampling, seed_of
from mote.core.records import Answer, AnswerTokens, Check, Finish, Question, StepText
from mote.core.scheme import ADAPTIVE, BASE, CHECK, CHECKED, Chain, Scheme
from mote.inference.batch_loop import BatchLoop
from mote.inference.events import Event, Events, Token, Verdict, final_chain
from mote.inference.grammar import FreeText, OpenStep, StepGrammar, chains_within
from mote.inference.inputs import Input, as_questions
from mote.inference.open_batch import open_batch
from mote.inference.request import Request
from mote.inference.self_check import CheckWords, SelfCheck
from mote.inference.separate import SeparateSteps, submit_steps
from mote.models.load import Base
from mote.tokens.encode import decode_steps, encode_choice, encode_prompt, special_ids, stop_ids
from mote.tokens.routing import Markers
from mote.tuner import MoteConfig

Output = list[Token | Verdict]


class Model:
    """A base model with a trained adapter; answers of all modes and lengths are generated in one running batch.

    Without an adapter (`config` is None) its only mode is `base`.

    Args:
        base: The base model with the adapter's tokenizer.
        model: The base model with its adapter.
        config: The adapter's configuration.
        scheme: The adapter's scheme.
        batch_size: Maximum number of answers in flight.
        batcher: Computes them; by default the model itself, by `open_batch`.
    """

    def __init__(
        self,
        base: Base,
        model: Any,
        config: MoteConfig | None,
        scheme: Scheme,
        batch_size: int = 16,
        batcher: BatchLoop | None = None,
    ) -> None:
        self.base = base
        self.model = model
        self.config = config
        self.scheme = scheme
        self.experts: Chain = config.experts if config else ()
        self.markers = (config and config.routing) or Markers(starts=(), ends=())
        self.tokenizer = base.tokenizer
        self.stop_ids = stop_ids(base.tokenizer, base.model)
        self.batcher = batcher or open_batch(model, batch_size, self.markers if config else None)

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
            mode: `direct`, `analysis`, `full`, `adaptive` (the model chooses its steps), `adaptive+check` (continues
                with the next deeper chain while the trained check finds the response unsafe) or `base` (adapter off).
            max_step_tokens: Budget of one step; the step is then closed and the answer continues.
            max_tokens: Budget of the whole answer; half of it is reserved for the response.
            temperature: 0 is greedy.
            top_p: Nucleus sampling threshold; draws depend on `seed` and the question, not on the batch.
            seed: Sampling seed.
            check_threshold: Least probability of a safe response, in the mode `adaptive+check`.
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
        tokens: SimpleQueue[Token | Verdict | None] = SimpleQueue()
        on_token = None if on_event is None else tokens.put
        futures = [
            self.submit(question, mode, limits, sampling, check_threshold=check_threshold, on_token=on_token)
            for question in questions
        ]
        try:
            if on_event is not None:  # called in this thread, so that what it raises reaches the caller
                futures[0].add_done_callback(lambda _: tokens.put(None))
                self._emit(tokens, on_event, self.events(mode))
            outputs = [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
        seconds = round((time.monotonic() - began) / len(questions), 3)
        return [
            self.read(question, output, mode, limits, system, seconds)
            for question, output in zip(questions, outputs, strict=True)
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
        on_token: Callable[[Token | Verdict], None] | None = None,
    ) -> "Future[Output]":
        """Queue a question (see `request`) for the running batch.

        Returns:
            A future of the output, for `read`; cancelling it ends the sequence.
        """
        request = self.request(
            question, mode, limits, sampling, check_threshold=check_threshold, shared=shared, on_token=on_token
        )
        if mode == BASE or self.config is None or not self.config.whole_rows:
            return self.batcher.submit(request)
        return submit_steps(self.batcher, self._separate(request, self._chains(mode), limits))

    def request(
        self,
        question: Question,
        mode: str,
        limits: Limits,
        sampling: Sampling = GREEDY,
        *,
        check_threshold: float = 0.5,
        shared: bool = False,
        on_token: Callable[[Token | Verdict], None] | None = None,
    ) -> Request:
        """The batcher's request for a question.

        Args:
            question: The dialogue to answer.
            mode: As for `answer`.
            limits: Token budgets.
            sampling: Its seed is combined with the question's id.
            check_threshold: As for `answer`.
            shared: The same question is asked in other modes at about the same time: those that use the adapter prefill
                it once.
            on_token: Called with each token and each verdict, in the batcher's thread; must not raise.

        Raises:
            UserError: The mode is not one of the scheme's or needs an adapter, or the prompt has no tokens.
        """
        if mode == BASE:
            limit = limits.max_tokens or limits.max_step_tokens
            grammar: Any = FreeText(self.stop_ids, [*self.markers.starts, *self.markers.ends])
        else:
            chains = self._chains(mode)
            steps = max(map(len, chains))
            limit = steps * (limits.max_step_tokens + 2)
            if limits.max_tokens is not None:
                limit = min(limit, limits.max_tokens)
            grammar = self._grammar(chains, limits)
        ids = encode_prompt(self.tokenizer, question.messages)
        request = Request(
            ids,
            grammar,
            limit,
            shared=len(ids) - 1 if shared else 0,
            sampling=replace(sampling, seed=seed_of(sampling.seed, question.id)),
            adapted=mode != BASE,
            on_token=on_token,
        )
        if mode == CHECKED:
            depths = {depth: self._chains(depth)[0] for depth in self.scheme.depths}
            within = chains_within(list(depths.values()), limits.max_tokens)
            depths = {depth: chain for depth, chain in depths.items() if chain in within}
            words = self._check_words(check_threshold)
            SelfCheck(request, depths, lambda depth: self._grammar([depths[depth]], limits), self.markers, words)
        return request

    def read(
        self,
        question: Question,
        output: Sequence[Token | Verdict],
        mode: str,
        limits: Limits,
        system: str = "mote",
        seconds: float = 0.0,
    ) -> Answer:
        """The output of `submit` as an `Answer`."""
        name = self.scheme.answer
        final = final_chain(output, self.markers)
        ids = final.ids
        counts = step_lengths(ids, self.markers, self.experts)
        finish: Finish
        if mode == BASE:
            finish = "stop" if ids and ids[-1] in self.stop_ids else "length"
            text = self.tokenizer.decode(ids[:-1] if finish == "stop" else ids, skip_special_tokens=True).strip()
            steps = [StepText(name=name, text=text)]
            counts = {name: len(ids)}
        else:
            steps = decode_steps(self.tokenizer, ids, self.markers, self.experts)
            over = limits.max_tokens is not None and len(ids) >= limits.max_tokens
            finish = "length" if over or counts.get(name, 0) >= limits.max_step_tokens + 2 else "stop"
            counts |= {CHECK: len(final.checks)} if final.checks else {}
        return Answer(
            **question.model_dump(),
            system=system,
            mode=mode,
            steps=tuple(steps),
            answer=next((step.text for step in steps if step.name == name), ""),
            finish=finish,
            tokens=AnswerTokens(steps=counts, total=len(output), dropped=final.dropped),
            seconds=seconds,
            safe=final.checks[-1][0].safe if final.checks else None,
            checks=tuple(self._check(verdict, response) for verdict, response in final.checks),
        )

    def events(self, mode: str) -> Events:
        """Turns the output of one answer in this mode into events."""
        return Events(self.tokenizer, self.markers, self.experts, self.scheme.answer, mode == CHECKED, self.stop_ids)

    def _check(self, verdict: Verdict, response: list[int]) -> Check:
        text = decode_steps(self.tokenizer, response, self.markers, self.experts)[0].text
        return Check(depth=verdict.depth, answer=text, safe=verdict.safe, score=verdict.score)

    def _grammar(self, chains: Sequence[tuple[int, ...]], limits: Limits) -> StepGrammar:
        return StepGrammar(
            chains, self.markers, self._not_in_steps, self.stop_ids[0], limits.max_step_tokens, limits.max_tokens
        )

    @property
    def _not_in_steps(self) -> set[int]:
        """Ids that no step may contain."""
        return special_ids(self.tokenizer) | set(self.stop_ids)

    def _check_words(self, threshold: float) -> CheckWords:
        """How the trained check's verdict is read.

        Raises:
            UserError: The tokenizer cannot distinguish the scheme's words.
        """
        words = self.scheme.verdicts
        if (found := encode_choice(self.tokenizer, words)) is None:
            raise UserError(
                f"check: in the tokens of {self.base.name} one of {words} is the beginning of the other; train with "
                "other words (`verdicts` of the scheme)"
            )
        return CheckWords(self.markers.starts[self.experts.index(CHECK)], *found, words, threshold)

    def _chains(self, mode: str) -> list[tuple[int, ...]]:
        """The chains of a mode, as step indices.

        Raises:
            UserError: The mode is not one of the model's, or there is no adapter.
        """
        if self.config is None:
            raise UserError(f"mode: '{mode}' needs a trained adapter; give one, or use the mode 'base'")
        self.scheme.check_mode(mode, self.experts)
        return [tuple(self.experts.index(step) for step in chain) for chain in self.scheme.chains_of(mode)]

    def _separate(self, request: Request, chains: Sequence[tuple[int, ...]], limits: Limits) -> SeparateSteps:
        """The steps of a chain, each for its own model; as in `StepGrammar`, half of the total is the response's."""
        if len(chains) > 1:
            raise UserError(
                "mode: with a model for each step none of them chooses the steps; use one of "
                f"{[mode for mode in self.scheme.modes if mode not in (BASE, ADAPTIVE)]}"
            )
        [chain] = chains
        grammars = [OpenStep([(step,)], self.markers, self._not_in_steps, self.stop_ids[0], 0) for step in chain]
        most = limits.max_step_tokens
        total = limits.max_tokens
        if total is None:
            return SeparateSteps(request, grammars, [lambda _: most] * len(chain))
        reasoning = max(1, min(most, total // 2 // max(1, len(chain) - 1) - 2))
        budgets = [lambda _: reasoning] * (len(chain) - 1)
        return SeparateSteps(request, grammars, [*budgets, lambda generated: min(most, total - generated - 2)])

    def _emit(
        self, tokens: "SimpleQueue[Token | Verdict | None]", on_event: Callable[[Event], None], events: Events
    ) -> None:
        while (token := tokens.get()) is not None:
            for event in events.token(token):
                on_event(event)
        for event in events.end():
            on_event(event)


def step_lengths(ids: Sequence[int], markers: Markers, experts: Chain) -> dict[str, int]:
    """Number of tokens of each step, its markers included."""
    counts: dict[str, int] = {}
    name = ""
    for id_ in ids:
        if id_ in markers.starts:
            name = experts[markers.starts.index(id_)]
        if name:
            counts[name] = counts.get(name, 0) + 1
    return counts
