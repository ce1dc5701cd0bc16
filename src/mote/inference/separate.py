"""Answers from a model for each step: each of them reads the text so far anew and writes its step.

A step's keys and values are of no use to the next model, so each step is a request of its own to the running batch.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from mote.core.seeds import seed_of
from mote.inference.batching import Batcher, Request
from mote.inference.events import Item
from mote.inference.grammar import OpenStep


@dataclass(frozen=True)
class Steps:
    """The steps to write, one after the other.

    Attributes:
        request: The prompt, how to sample, and the limit of all steps together; its grammar is that of no step.
        grammars: One a step, in order.
        budgets: Tokens of each step at most, its end marker among them, where so many are written already.
    """

    request: Request
    grammars: Sequence[OpenStep]
    budgets: Sequence[Callable[[int], int]]


def submit_steps(batcher: Batcher, steps: Steps) -> "Future[list[Item]]":
    """Queue the first step; each step's end queues the next one.

    Returns:
        A future of all written ids, start markers included; cancelling it ends the answer with its step.
    """
    result: Future[list[Item]] = Future()
    on_token = steps.request.on_token

    def go_on(written: list[int], number: int) -> None:
        if result.cancelled():
            return
        room = steps.request.limit - len(written)
        if number == len(steps.grammars) or room < 1:
            finish(written)
            return
        grammar = steps.grammars[number]
        grammar.max_step_tokens = steps.budgets[number](len(written))
        written = [*written, grammar.start]
        if on_token is not None:
            on_token(grammar.start)
        if room == 1:
            finish(written)
            return
        sampling = steps.request.sampling
        request = replace(
            steps.request,
            ids=[*steps.request.ids, *written],
            grammar=grammar,
            limit=min(max(grammar.max_step_tokens, 0) + 1, room - 1),
            sampling=replace(sampling, seed=seed_of(sampling.seed, number)),
        )
        batcher.submit(request).add_done_callback(lambda done: end(done, written, number))

    def finish(written: list[int]) -> None:
        if result.set_running_or_notify_cancel():
            result.set_result([*written])

    def end(done: "Future[list[int]]", written: list[int], number: int) -> None:
        error = done.exception()
        if error is None:
            go_on([*written, *done.result()], number + 1)
        elif result.set_running_or_notify_cancel():
            result.set_exception(error)

    go_on([], 0)
    return result
