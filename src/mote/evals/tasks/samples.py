"""Questions as Inspect samples, and what a task is called."""

import site
import sys
from pathlib import Path

from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessage, ChatMessageAssistant, ChatMessageSystem, ChatMessageUser

from mote.core.errors import UserError
from mote.core.records import Message, Question
from mote.questions.load import load_questions

_PACKAGE = "mote"
_KINDS = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}


def task_name(name: str) -> str:
    """What a task is to be called so that Inspect finds it as `mote/<name>`.

    Inspect puts the package in front by itself where that lies in site-packages. Of an editable install it looks for a
    distribution of the package's name, and ours has another.
    """
    folders = [*site.getsitepackages(), site.getusersitepackages(), *(p for p in sys.path if "site-packages" in p)]
    installed = any(Path(__file__).is_relative_to(folder) for folder in folders)
    return name if installed else f"{_PACKAGE}/{name}"


def sample_of(question: Question, type_: str = "") -> Sample:
    """A question as it is, with what rows say of it."""
    return Sample(
        id=question.id,
        input=chat(question.messages),
        metadata={"question_id": question.id, "kind": question.kind, "type": type_},
    )


def chat(messages: tuple[Message, ...]) -> list[ChatMessage]:
    """A dialogue as Inspect's messages."""
    return [_KINDS[message.role](content=message.content) for message in messages]


def harmful_questions(file: str, limit: int | None) -> list[Question]:
    """The questions of a file that it does not call benign.

    Raises:
        UserError: There are none.
    """
    questions = [question for question in load_questions(file, None) if question.kind != "benign"]
    if not questions:
        raise UserError(f"file: {file} holds benign questions only; give harmful ones")
    return questions[:limit]
