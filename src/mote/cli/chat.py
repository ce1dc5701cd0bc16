"""A conversation in the terminal that shows the steps as they come."""

import sys

from mote.core.errors import UserError
from mote.core.recipe import AnswerSettings
from mote.inference.events import Event
from mote.inference.model import Model

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def talk(model: Model, mode: str, settings: AnswerSettings, seed: int, show_steps: bool) -> None:
    """Read questions from stdin until its end or /quit; earlier reasoning is left out of the history."""
    model.scheme.check_mode(mode, model.experts)
    history: list[dict[str, str]] = []
    while (line := _read(mode)) is not None:
        if line == "/quit":
            return
        if line.startswith("/mode"):
            mode = _changed(model, mode, line.removeprefix("/mode").strip())
            continue
        if not line:
            continue
        history.append({"role": "user", "content": line})
        answer = model.answer(
            history,
            mode,
            max_step_tokens=settings.max_step_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=seed,
            check_threshold=settings.check_threshold,
            on_event=lambda event: _show(event, model.scheme.answer, show_steps),
        )
        if answer.safe is False:
            print("(unsafe, says its own check)")
        history.append({"role": "assistant", "content": answer.answer})


def _read(mode: str) -> str | None:
    try:
        return input(f"[{mode}] you> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _changed(model: Model, mode: str, wanted: str) -> str:
    try:
        model.scheme.check_mode(wanted, model.experts)
        return wanted
    except UserError as error:
        print(f"mote: {error}", file=sys.stderr)
        return mode


def _show(event: Event, answer_step: str, show_steps: bool) -> None:
    dim = sys.stdout.isatty() and event.step != answer_step
    if event.kind == "done":
        print(f"({event.tokens} tokens)")
    elif event.step != answer_step and not show_steps:
        return
    elif event.kind == "check":
        print(f"{_DIM if dim else ''}{event.step}> {event.text} ({event.score:.2f}){_PLAIN if dim else ''}")
    elif event.kind == "again":
        print(f"{_DIM if dim else ''}{event.step}> goes on with {event.text}{_PLAIN if dim else ''}")
    elif event.kind == "begin":
        print(f"{_DIM if dim else ''}{event.step}> ", end="")
    elif event.kind == "text":
        print(event.text, end="", flush=True)
    elif event.kind == "end":
        print(_PLAIN if dim else "")
