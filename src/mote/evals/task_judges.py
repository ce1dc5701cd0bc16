"""Judges of an evaluation: opened once for all tasks that run together, and closed when they have ended.

Beside the names of `mote.evals.judges.open` there are `inspect:MODEL` for any model that Inspect knows, and judges of
your own that were registered in this process. A judge is the base model or another one, never the adapter with its
chain.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from inspect_ai.hooks import Hooks, RunEnd, hooks
from inspect_ai.model import GenerateConfig, get_model

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
_OWN: dict[str, Judge] = {}


class _Open:
    """The judges that are open in one event loop, each opened by the first who asks."""

    def __init__(self) -> None:
        self.stack = AsyncExitStack()
        self.lock = asyncio.Lock()
        self.judges: dict[tuple[str, str, str | None], Judge] = {}


_OPEN: dict[asyncio.AbstractEventLoop, _Open] = {}


def register_judge(name: str, judge: Judge) -> None:
    """Make a judge of your own known by a name, for tasks and suites that run in this process."""
    _OWN[name] = judge


def check_judge(name: str) -> None:
    """Make sure that a name can be a judge's, before anything is answered.

    Raises:
        UserError: It cannot.
    """
    kind, _, model = name.partition(":")
    families = {"choice", "llm", _INSPECT.rstrip(":"), *load_formats()}
    if name not in {"rule", "self", *_OWN} and not (kind in families and model):
        known = ["rule", "self", *(f"{family}:MODEL" for family in sorted(families)), *_OWN]
        raise UserError(f"judge: '{name}' is not a judge; use one of {known}")


async def judge_for(name: str, measures: str) -> Judge:
    """The judge of a name that measures something.

    Args:
        name: As on the command line.
        measures: What the task asks, which is also the prompt of a judge that is prompted: `refusal`, `harm`, `help`,
            `harm-help`, `strongreject`, `analysis-quality` or `guidance-quality`.

    Raises:
        UserError: There is no such judge, or what it needs is not to be had.
    """
    if name in _OWN:
        return _OWN[name]
    base = _base_model() if name == "self" else None
    there = _OPEN.setdefault(asyncio.get_running_loop(), _Open())
    async with there.lock:
        key = (name, measures, base)
        if key not in there.judges:
            opened = _inspect_judge(name, measures) if name.startswith(_INSPECT) else open_judge(name, measures, base)
            there.judges[key] = await there.stack.enter_async_context(opened)
        return there.judges[key]


def _base_model() -> str:
    """The base model of what is being evaluated, for the judge `self`."""
    api = get_model().api
    if not isinstance(api, MoteAPI):
        raise UserError(
            "judge: 'self' is the base model of a model in this process; name another judge for an endpoint"
        )
    return api.model_name


@asynccontextmanager
async def _inspect_judge(name: str, measures: str) -> AsyncIterator[Judge]:
    model = name.removeprefix(_INSPECT)
    yield LlmJudge(_Writer(model), load_prompt(measures), name)


class _Writer:
    """A model of Inspect's as judges ask one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._model = get_model(name)

    async def write(self, prompt: Prompt) -> Completion:
        """One completion."""
        config = GenerateConfig(max_tokens=prompt.max_tokens, temperature=prompt.temperature, seed=prompt.seed)
        output = await self._model.generate(chat(prompt.messages), config=config)
        tokens = output.usage.output_tokens if output.usage else 0
        return Completion(output.completion, tokens, "length" if output.stop_reason == "max_tokens" else "stop")


@hooks(name="mote_judges", description="Closes the judges of a run.")
class _Closing(Hooks):
    """Closes what was opened in the loop of a run when the run ends."""

    def enabled(self) -> bool:
        return bool(_OPEN)

    async def on_run_end(self, data: RunEnd) -> None:
        """The run has ended."""
        there = _OPEN.pop(asyncio.get_running_loop(), None)
        if there is not None:
            await there.stack.aclose()
