"""A loaded model shared by all modes of a system: their requests are generated in one continuous batch.

The batch mixes modes; a prompt that several modes receive is prefilled once. Generation runs outside the event loop, so
judging overlaps with it. Independent of Inspect.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from mote.core.generation import Limits, Sampling
from mote.core.records import Answer, Message
from mote.core.scheme import BASE
from mote.inference.inputs import as_question
from mote.tokens.encode import encode_prompt

if TYPE_CHECKING:
    from mote.inference.model import Model


class GenerationSettings(NamedTuple):
    """How one answer is generated."""

    limits: Limits
    sampling: Sampling
    check_threshold: float


class GeneratedAnswer(NamedTuple):
    """An answer, the name of its response step, and the number of prompt tokens."""

    answer: Answer
    response_step: str
    prompt_tokens: int


class SharedModel:
    """A model that is loaded on the first request.

    Args:
        load: Loads it.
    """

    def __init__(self, load: Callable[[], "Model"]) -> None:
        self.modes: set[str] = set()  # modes that will send requests
        self._load = load
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="mote-load")
        self._model: Model | None = None

    async def answer(self, messages: Sequence[Message], mode: str, settings: GenerationSettings) -> GeneratedAnswer:
        """Answer a dialogue in a mode.

        Raises:
            UserError: The model cannot be loaded, does not have the mode, or the last turn is not the user's.
        """
        model = self._model
        if model is None:  # a single loader thread, so concurrent first requests load the model once
            model = await asyncio.get_running_loop().run_in_executor(self._loader, self._load_once)
        question = as_question([message.model_dump() for message in messages])
        started = time.monotonic()
        future = model.submit(
            question,
            mode,
            settings.limits,
            settings.sampling,
            check_threshold=settings.check_threshold,
            shared=mode != BASE and len(self.modes - {BASE}) > 1,
        )
        generated = await asyncio.wrap_future(future)
        answer = model.read(question, generated, mode, settings.limits, seconds=round(time.monotonic() - started, 3))
        return GeneratedAnswer(answer, model.scheme.answer, len(encode_prompt(model.tokenizer, question.messages)))

    @property
    def tokens_computed(self) -> int:
        """Tokens that went through the model so far."""
        return self._model.batcher.tokens_computed if self._model else 0

    def close(self) -> None:
        """Release the model; its batching thread ends once nothing is in flight."""
        self._loader.shutdown(wait=True)
        self._model = None

    def _load_once(self) -> "Model":
        self._model = self._model or self._load()
        return self._model
