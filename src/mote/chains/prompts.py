"""A scheme and a question -> the prompt that asks a model for a stage, or for its check of an answer.

Worked examples are turns of a dialogue that the question goes on with, so user and assistant alternate whatever the
stage, and a system text stands in front of them all: chat templates refuse anything else. This module knows nothing of
models.
"""

from collections.abc import Mapping, Sequence

from mote.chains.engine import Prompt
from mote.core.recipe import ChainSettings
from mote.core.records import Message
from mote.core.scheme import CHECK, Example, Scheme


def stage_prompt(
    scheme: Scheme,
    stage: str,
    question: Sequence[Message],
    known: Mapping[str, str],
    settings: ChainSettings,
    seed: int,
    category: str | None = None,
) -> Prompt:
    """The prompt that asks for a stage of a chain.

    Args:
        scheme: Its templates and examples.
        stage: What is to be written.
        question: A dialogue that ends with the user's turn.
        known: Stage -> text, of those that were written before; the examples show the same ones.
        settings: Number of examples, sampling, and tokens that may be written.
        seed: Seed of this request.
        category: Show examples of this category only.
    """
    turns: list[Message] = []
    for example in scheme.first_examples(settings.examples, category):
        turns += _asked(scheme, stage, _dialogue(example), {name: example.steps[name] for name in known})
        turns.append(Message(role="assistant", content=example.steps[stage]))
    lead, own = _system(scheme, stage, question), _asked(scheme, stage, question, known)
    return Prompt(
        messages=(*lead, *turns, *own),
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=seed,
        frequency_penalty=settings.frequency_penalty,
        shared=_shared(scheme, lead, turns),
    )


def check_prompt(
    scheme: Scheme, question: Sequence[Message], answer: str, settings: ChainSettings, seed: int
) -> Prompt:
    """The prompt that asks which of the scheme's two verdicts an answer deserves (Safety Checking, section 3.1).

    Each worked example shows an answer that passes and one that does not, in an order that changes from one example to
    the next, so that the words do not simply alternate.
    """
    turns: list[Message] = []
    for number, example in enumerate(scheme.first_examples(settings.examples)):
        shown = [(example.steps[scheme.answer], scheme.verdicts[0])]
        if example.unsafe_answer is not None:
            shown.append((example.unsafe_answer, scheme.verdicts[1]))
        for text, verdict in reversed(shown) if number % 2 else shown:
            turns += _asked(scheme, CHECK, _dialogue(example), {"answer": text})
            turns.append(Message(role="assistant", content=verdict))
    lead, own = _system(scheme, CHECK, question), _asked(scheme, CHECK, question, {"answer": answer})
    return Prompt((*lead, *turns, *own), max_tokens=4, seed=seed, shared=_shared(scheme, lead, turns))


def category_prompt(scheme: Scheme, category: str) -> Prompt:
    """The prompt that scores a question for a category: its heading, its example questions, "Write another one."."""
    listed = "\n".join(f"- {example.question}" for example in scheme.first_examples(len(scheme.examples), category))
    about = scheme.categories[category].about
    turn = Message(role="user", content=f"{about}\n{listed}\n\nWrite another one.")
    return Prompt((turn,), max_tokens=1, shared=1)


def as_text(messages: Sequence[Message]) -> str:
    """A dialogue as text: the question itself where there is one turn, else each turn behind its speaker."""
    if len(messages) == 1:
        return messages[0].content
    return "\n".join(f"{message.role.capitalize()}: {message.content}" for message in messages)


def _asked(scheme: Scheme, stage: str, messages: Sequence[Message], known: Mapping[str, str]) -> list[Message]:
    """The user turn that asks for a stage, behind the dialogue's earlier turns where the stage goes on with it."""
    last = messages[-1].content
    turn = Message(role="user", content=scheme.render(stage, question=as_text(messages), last=last, **known))
    earlier = [m for m in messages[:-1] if m.role != "system"] if scheme.continues_dialogue(stage) else []
    return [*earlier, turn]


def _system(scheme: Scheme, stage: str, question: Sequence[Message]) -> tuple[Message, ...]:
    """The scheme's system prompt, and the question's own where the stage goes on with it, as one message."""
    own = [m.content for m in question if m.role == "system"] if scheme.continues_dialogue(stage) else []
    text = "\n\n".join(part for part in [scheme.system, *own] if part)
    return (Message(role="system", content=text),) if text else ()


def _shared(scheme: Scheme, lead: Sequence[Message], turns: Sequence[Message]) -> int:
    """How many messages are the same for all questions: none where a question brings a system message of its own."""
    ours = not lead or lead[0].content == scheme.system
    return len(lead) + len(turns) if ours else 0


def _dialogue(example: Example) -> tuple[Message, ...]:
    earlier = [
        Message(role="assistant" if place % 2 else "user", content=text) for place, text in enumerate(example.earlier)
    ]
    return (*earlier, Message(role="user", content=example.question))
