"""Judges of a running evaluation: each is opened once, shared by all tasks that run together, and closed at the end.

Adds two kinds to the names of `mote.evals.judges.open`: `inspect:MODEL`, any model that Inspect can call, and judges
registered in this process (`register_judge`). A judge is the base model or another model, never the adapter with its
chain.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from inspect_ai.hooks import Hooks, RunEnd, hooks
from inspect_ai.model import GenerateConfig, get_model
from typing_extensions import override

from mote.chains.engine import Completion, Prompt
from mote.chains.judge import Judge
from mote.core.errors import UserError
from mote.evals.judges.formats import load_formats
from mote.evals.judges.llm import LlmJudge
from mote.evals.judges.open import open_judge
from mote.evals.judges.prompts import load_prompt
from mote.evals.provider import MoteAPI
from mote.evals.tasks.samples import chat

_INSPECT = "inspect:"
_REGISTERED: dict[str, Judge] = {}


class _OpenJudges:
    """The judges that are open in one event loop; each is opened by its first caller."""

    def __init__(self) -> None:
        self.stack = AsyncExitStack()
        self.lock = asyncio.Lock()
        self.judges: dict[tuple[str, str, str | None], Judge] = {}


_OPEN: dict[asyncio.AbstractEventLoop, _OpenJudges] = {}


def register_judge(name: str, judge: Judge) -> None:
    """Make a custom judge available by name to tasks and suites in this process."""
    _REGISTERED[name] = judge


def check_judge(name: str) -> None:
    """Check the name of a judge before anything is generated.

    Raises:
        UserError: No judge can have this name.
    """
    kind, _, model = name.partition(":")
    families = {"choice", "llm", _INSPECT.rstrip(":"), *load_formats()}
    if name not in {"rule", "self", *_REGISTERED} and not (kind in families and model):
        known = ["rule", "self", *(f"{family}:MODEL" for family in sorted(families)), *_REGISTERED]
        raise UserError(f"judge: '{name}' is not a judge; use one of {known}")


async def judge_for(name: str, measures: str) -> Judge:
    """The shared judge of this name, opened on first use.

    Args:
        name: As on the command line.
        measures: What the task measures, which also selects the prompt of an LLM judge: `refusal`, `harm`, `help`,
            `harm-help`, `strongreject`, `analysis-quality` or `guidance-quality`.

    Raises:
        UserError: No judge has this name, or its model cannot be loaded.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]
    base = _base_model() if name == "self" else None
    opened = _OPEN.setdefault(asyncio.get_running_loop(), _OpenJudges())
    async with opened.lock:
        key = (name, measures, base)
        if key not in opened.judges:
            judge = _inspect_judge(name, measures) if name.startswith(_INSPECT) else open_judge(name, measures, base)
            opened.judges[key] = await opened.stack.enter_async_context(judge)
        return opened.judges[key]


def _base_model() -> str:
    """Name of the base model under evaluation, for the judge `self`."""
    api = get_model().api
    if not isinstance(api, MoteAPI):
        raise UserError(
            "judge: 'self' is the base model of a model in this process; name another judge for an endpoint"
        )
    return api.model_name


@asynccontextmanager
async def _inspect_judge(name: str, measures: str) -> AsyncIterator[Judge]:
    model = name.removeprefix(_INSPECT)
    yield LlmJudge(_InspectWriter(model), load_prompt(measures), name)


class _InspectWriter:
    """Adapts an Inspect model to the `Writer` protocol of judges."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._model = get_model(name)

    async def write(self, prompt: Prompt) -> Completion:
        """One completion."""
        config = GenerateConfig(max_tokens=prompt.max_tokens, temperature=prompt.temperature, seed=prompt.seed)
        output = await self._model.generate(chat(prompt.messages), config=config)
        tokens = output.usage.output_tokens if output.usage else 0
        finished = output.stop_reason in ("stop", "unknown")
        return Completion(output.completion, tokens, "stop" if finished else "length")


@hooks(name="mote_judges", description="Closes the judges of a run.")
class _CloseJudges(Hooks):
    """Closes the judges of an event loop when its run ends."""

    @override
    def enabled(self) -> bool:
        return bool(_OPEN)

    @override
    async def on_run_end(self, data: RunEnd) -> None:
        opened = _OPEN.pop(asyncio.get_running_loop(), None)
        if opened is not None:
            await opened.stack.aclose()
