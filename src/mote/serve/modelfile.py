"""An Ollama `Modelfile` for a GGUF file: the chat template in Ollama's language, if it can be expressed in it.

Ollama reads no Jinja. What a template puts before and after each message is measured by rendering; the result is used
only if it gives the same text for other dialogues too.
Needs no Ollama.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError

Dialogue = Sequence[tuple[str, str]]  # (role, text) of each message
Render = Callable[[Dialogue, bool], str]  # a dialogue, and whether an answer follows -> text


@dataclass(frozen=True)
class Frame:
    """What a chat template puts around messages.

    Attributes:
        opening: Text before the first message if there is no system message.
        around: Role -> text before and after a message.
        answer: Text before an answer.
    """

    opening: str
    around: dict[str, tuple[str, str]]
    answer: str

    def render(self, dialogue: Dialogue, generate: bool) -> str:
        """The text that the frame makes of a dialogue."""
        parts = [] if dialogue[0][0] == "system" else [self.opening]
        parts += [text.join(self.around[role]) for role, text in dialogue]
        return "".join(parts) + (self.answer if generate else "")


def find_frame(render: Render) -> Frame | None:
    """The frame of a chat template; None if it has no such simple form.

    Args:
        render: Renders a dialogue by the template.
    """
    first, second, third = (secrets.token_hex(16) for _ in range(3))
    dialogue = [("user", first), ("assistant", second), ("user", third)]
    try:
        text = render(dialogue, False)
        head = text.split(first)[0]
        between = text.split(first)[1].split(second)[0]
        rest = text.split(second)[1]
        after_answer, after_user = rest.split(third)
        answer = render([("user", first)], True).split(first)[1]
        with_system = render([("system", first), ("user", second)], False).split(first)
    except (IndexError, ValueError, TemplateError):  # some templates refuse a system message, or drop it
        return None
    if not between.startswith(after_user) or not answer.startswith(after_user):
        return None
    before_answer = between.removeprefix(after_user)
    # Between an answer and the next question, what also ends a dialogue's opening belongs to the question.
    size = next(n for n in range(len(after_answer), -1, -1) if head.endswith(after_answer[len(after_answer) - n :]))
    before_user = after_answer[len(after_answer) - size :]
    after_answer = after_answer[: len(after_answer) - size]
    before_system = with_system[0]
    after_system = with_system[1].split(second)[0]
    if not after_system.endswith(before_user):
        return None
    frame = Frame(
        head[: len(head) - size],
        {
            "system": (before_system, after_system[: len(after_system) - size]),
            "user": (before_user, after_user),
            "assistant": (before_answer, after_answer),
        },
        answer.removeprefix(after_user),
    )
    return frame if _same(frame, render) else None


def _same(frame: Frame, render: Render) -> bool:
    """Whether the frame gives the template's text for some dialogues."""
    system, turns = [("system", "Be brief.")], [("user", "One?"), ("assistant", "1"), ("user", "Two?")]
    dialogues = [turns[:1], turns, [*system, *turns[:1]], [*system, *turns], [*turns, ("assistant", "2"), turns[0]]]
    return all(frame.render(dialogue, True) == render(dialogue, True) for dialogue in dialogues)


def modelfile(gguf: str, frame: Frame | None, stops: Sequence[str]) -> str:
    """The content of a `Modelfile`.

    Args:
        gguf: Name of the GGUF file beside it.
        frame: What the chat template puts around messages; None leaves it to Ollama.
        stops: Texts that end an answer.
    """
    lines = [f"FROM ./{gguf}", "PARAMETER temperature 0"]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    if frame is None:
        lines.append("# The chat template cannot be expressed in Ollama's language; give prompts as raw text.")
    else:
        before, after = frame.around["system"]
        system = f"{{{{ if .System }}}}{_quoted(before)}{{{{ .System }}}}{_quoted(after)}"
        system += f"{{{{ else }}}}{_quoted(frame.opening)}{{{{ end }}}}"
        turns = "".join(_turn(role, *frame.around[role]) for role in ("user", "assistant"))
        lines.append(f'TEMPLATE """{system}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{_quoted(frame.answer)}"""')
    return "\n".join(lines) + "\n"


def _turn(role: str, before: str, after: str) -> str:
    return f'{{{{ if eq .Role "{role}" }}}}{_quoted(before)}{{{{ .Content }}}}{_quoted(after)}{{{{ end }}}}'


def _quoted(text: str) -> str:
    """Text inside a Go template; braces and quotes could be read as the language's own."""
    return text if "{{" not in text and '"""' not in text else f"{{{{ `{text}` }}}}"
