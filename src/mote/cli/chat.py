"""`mote chat`: a conversation in the terminal that streams the steps."""

import sys
from typing import TYPE_CHECKING, Any

import click

from mote.cli.options import adapter_of, mote, options, settings_of
from mote.core.errors import UserError
from mote.core.generation import Limits, Sampling
from mote.core.recipe import AnswerSettings
from mote.inference.inputs import as_question

if TYPE_CHECKING:
    from mote.inference.events import Event
    from mote.inference.model import Model

_DIM = "\x1b[2m"
_PLAIN = "\x1b[0m"


@mote.command()
@options("model", "adapter", "mode", "answer-engine", "seed")
@click.option("--show-steps/--answer-only", default=True, help="Show the reasoning steps, or the answer only.")
def chat(
    overrides: tuple[str, ...], adapter: str | None, modes: tuple[str, ...], show_steps: bool, **flags: Any
) -> None:
    """Chat with a trained model and watch its steps. /mode NAME changes the mode, /quit ends."""
    settings = settings_of(None, overrides, flags)
    adapter = adapter_of(adapter)
    from mote.inference.load import load_for

    model = load_for(settings, adapter, batch_size=1)
    talk(model, modes[0] if modes else "adaptive", settings.answer, settings.seed, show_steps)


def talk(model: "Model", mode: str, settings: AnswerSettings, seed: int, show_steps: bool) -> None:
    """Answer questions from stdin until its end or /quit; the history keeps answers without their reasoning."""
    model.scheme.check_mode(mode, model.experts)
    history: list[dict[str, str]] = []
    while (line := _read(mode)) is not None:
        if line == "/quit":
            return
        if line.startswith("/mode"):
            mode = _changed_mode(model, mode, line.removeprefix("/mode").strip())
            continue
        if not line:
            continue
        history.append({"role": "user", "content": line})
        [answer] = model.answer_questions(
            [as_question(history)],
            mode,
            Limits(settings.max_step_tokens),
            Sampling(settings.temperature, settings.top_p, seed),
            check_threshold=settings.check_threshold,
            on_event=lambda event: _show(event, model.scheme.answer, show_steps),
        )
        if answer.safe is False:
            print("(unsafe according to its own check)")
        history.append({"role": "assistant", "content": answer.answer})


def _read(mode: str) -> str | None:
    try:
        return input(f"[{mode}] you> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _changed_mode(model: "Model", mode: str, wanted: str) -> str:
    """The wanted mode; the current one if the model has no such mode."""
    try:
        model.scheme.check_mode(wanted, model.experts)
        return wanted
    except UserError as error:
        print(f"mote: {error}", file=sys.stderr)
        return mode


def _show(event: "Event", answer_step: str, show_steps: bool) -> None:
    dim = sys.stdout.isatty() and event.step != answer_step
    if event.kind == "done":
        print(f"({event.tokens} tokens)")
    elif event.step != answer_step and not show_steps:
        return
    elif event.kind == "check":
        print(f"{_DIM if dim else ''}{event.step}> {event.text} ({event.score:.2f}){_PLAIN if dim else ''}")
    elif event.kind == "again":
        print(f"{_DIM if dim else ''}{event.step}> retry with {event.text}{_PLAIN if dim else ''}")
    elif event.kind == "begin":
        print(f"{_DIM if dim else ''}{event.step}> ", end="")
    elif event.kind == "text":
        print(event.text, end="", flush=True)
    elif event.kind == "end":
        print(_PLAIN if dim else "")
