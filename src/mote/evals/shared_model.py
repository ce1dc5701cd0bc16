"""One loaded model that answers any number of requests at once, in any of its modes, in one running batch.

Rows of several modes stand side by side, and a prompt that several modes are asked is read once. The event loop stays
free meanwhile, so judging goes on beside it. This file knows nothing of Inspect.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from mote.core.records import Answer, Message
from mote.core.scheme import BASE
from mote.tokens.encode import encode_prompt

if TYPE_CHECKING:
    from mote.inference.model import Model


class Settings(NamedTuple):
    """How one answer is written."""

    max_step_tokens: int
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int
    check_threshold: float


class Written(NamedTuple):
    """An answer, the step of it that the user reads, and the tokens of the prompt it was written for."""

    answer: Answer
    step: str
    prompt_tokens: int


class Answering:
    """A model that is loaded when it is first asked.

    Args:
        load: Loads it.
    """

    def __init__(self, load: Callable[[], "Model"]) -> None:
        self.modes: set[str] = set()  # that will be asked
        self._load = load
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="mote-load")
        self._model: Model | None = None

    async def answer(self, messages: Sequence[Message], mode: str, settings: Settings) -> Written:
        """Answer a dialogue in a mode.

        Raises:
            UserError: The model cannot be loaded, has no such mode, or the dialogue does not end with the user.
        """
        model = self._model
        if model is None:  # one thread: whoever asks first loads it, the others find it loaded
            model = await asyncio.get_running_loop().run_in_executor(self._loader, self._loaded)
        from mote.inference.model import Limits, as_question

        question = as_question([message.model_dump() for message in messages])
        limits, began = Limits(settings.max_step_tokens, settings.max_tokens), time.monotonic()
        future = model.submit(
            question,
            mode,
            limits,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed,
            check_threshold=settings.check_threshold,
            shared=mode != BASE and len(self.modes - {BASE}) > 1,
        )
        written = await asyncio.wrap_future(future)
        answer = model.read(question, written, mode, limits, seconds=round(time.monotonic() - began, 3))
        return Written(answer, model.scheme.answer, len(encode_prompt(model.tokenizer, question.messages)))

    @property
    def tokens_computed(self) -> int:
        """Tokens that went through the model so far."""
        return self._model.batcher.tokens_computed if self._model else 0

    def close(self) -> None:
        """Let go of the model; the thread of its batch ends when nothing is left to write."""
        self._loader.shutdown(wait=True)
        self._model = None

    def _loaded(self) -> "Model":
        self._model = self._model or self._load()
        return self._model
