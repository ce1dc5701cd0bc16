"""Generation for `method=separate`: each step's model re-prefills the context and generates its step.

One model cannot use the KV cache of another, so every step is a separate request to the running batch.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from mote.core.generation import seed_of
from mote.inference.batch_loop import BatchLoop
from mote.inference.events import Token, Verdict
from mote.inference.grammar import OpenStep
from mote.inference.request import Request


@dataclass(frozen=True)
class SeparateSteps:
    """Steps to generate, one after the other.

    Attributes:
        request: The prompt, how to sample, and the limit of all steps together; its grammar is not used.
        grammars: One per step, in order.
        budgets: Maximum tokens of each step with its end marker, given the number of tokens generated before it.
    """

    request: Request
    grammars: Sequence[OpenStep]
    budgets: Sequence[Callable[[int], int]]


def submit_steps(batcher: BatchLoop, steps: SeparateSteps) -> "Future[list[Token | Verdict]]":
    """Queue the first step; the end of each step queues the next one.

    Returns:
        A future of all generated ids, start markers included; cancelling it ends the answer with the current step.
    """
    result: Future[list[Token | Verdict]] = Future()
    on_token = steps.request.on_token

    def start(generated: list[int], number: int) -> None:
        if result.cancelled():
            return
        room = steps.request.limit - len(generated)
        if number == len(steps.grammars) or room < 1:
            finish(generated)
            return
        grammar = steps.grammars[number]
        grammar.max_step_tokens = steps.budgets[number](len(generated))
        generated = [*generated, grammar.start]
        if on_token is not None:
            on_token(grammar.start)
        if room == 1:
            finish(generated)
            return
        sampling = steps.request.sampling
        request = replace(
            steps.request,
            ids=[*steps.request.ids, *generated],
            grammar=grammar,
            limit=min(max(grammar.max_step_tokens, 0) + 1, room - 1),
            sampling=replace(sampling, seed=seed_of(sampling.seed, number)),
        )
        batcher.submit(request).add_done_callback(lambda done: end(done, generated, number))

    def finish(generated: list[int]) -> None:
        if result.set_running_or_notify_cancel():
            result.set_result([*generated])

    def end(done: "Future[list[int]]", generated: list[int], number: int) -> None:
        error = done.exception()
        if error is None:
            start([*generated, *done.result()], number + 1)
        elif result.set_running_or_notify_cancel():
            result.set_exception(error)

    start([], 0)
    return result
