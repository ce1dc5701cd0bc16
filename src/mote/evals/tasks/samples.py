"""Questions as Inspect samples, and the names of tasks."""

import site
import sys
from pathlib import Path

from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessage, ChatMessageAssistant, ChatMessageSystem, ChatMessageUser

from mote.core.errors import UserError
from mote.core.records import Message, Question
from mote.questions.load import load_questions

_PACKAGE = "mote"
_MESSAGE_TYPES = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}


def task_name(name: str) -> str:
    """The name under which to register a task so that Inspect finds it as `mote/<name>`.

    Inspect prepends the package itself if it is in site-packages. For an editable install it looks for a distribution
    with the package's name, and ours is called differently.
    """
    folders = [*site.getsitepackages(), site.getusersitepackages(), *(p for p in sys.path if "site-packages" in p)]
    installed = any(Path(__file__).is_relative_to(folder) for folder in folders)
    return name if installed else f"{_PACKAGE}/{name}"


def sample_of(question: Question, type_: str = "") -> Sample:
    """A question as a sample, with the fields of its result row as metadata."""
    return Sample(
        id=question.id,
        input=chat(question.messages),
        metadata={"question_id": question.id, "kind": question.kind, "type": type_},
    )


def chat(messages: tuple[Message, ...]) -> list[ChatMessage]:
    """A dialogue as Inspect messages."""
    return [_MESSAGE_TYPES[message.role](content=message.content) for message in messages]


def benign_questions(file: str, limit: int | None) -> list[Question]:
    """The questions of a file that are labelled benign.

    Raises:
        UserError: None is.
    """
    questions = [question for question in load_questions(file, None) if question.kind == "benign"]
    if not questions:
        raise UserError(f"file: {file} holds no benign questions; give questions whose kind is benign")
    return questions[:limit]


def harmful_questions(file: str, limit: int | None) -> list[Question]:
    """The questions of a file that are not labelled benign.

    Raises:
        UserError: All are benign.
    """
    questions = [question for question in load_questions(file, None) if question.kind != "benign"]
    if not questions:
        raise UserError(f"file: {file} holds benign questions only; give harmful ones")
    return questions[:limit]
