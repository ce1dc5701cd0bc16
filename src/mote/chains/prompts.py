"""A scheme and a question -> the prompt for a stage, or for the check of an answer.

Worked examples are earlier turns of the same dialogue, so user and assistant alternate in every prompt, after at most
one system message: chat templates refuse anything else. This module knows nothing about models.
"""

from collections.abc import Mapping, Sequence

from mote.chains.engine import Prompt
from mote.core.recipe import ChainSettings
from mote.core.records import Message
from mote.core.scheme import CHECK, Chain, Example, Scheme


def stage_prompt(
    scheme: Scheme,
    stage: str,
    question: Sequence[Message],
    known: Mapping[str, str],
    settings: ChainSettings,
    seed: int,
    category: str | None = None,
    stages: Chain = (),
) -> Prompt:
    """The prompt for a stage of a chain.

    Args:
        scheme: Templates and worked examples.
        stage: The stage to generate.
        question: A dialogue that ends with a user turn.
        known: Earlier stage -> its text; the examples show the same stages.
        settings: Number of examples, sampling and token budget.
        seed: Seed of this request.
        category: Show examples of this category only.
        stages: All stages of this chain, which the examples of a threaded scheme show.
    """
    turns: list[Message] = []
    plain = scheme.bare and stage == scheme.answer and not known
    bare = category is not None and stage in scheme.categories[category].bare
    shown = 0 if plain or bare else settings.examples
    before = tuple(known)
    stages = (stages or (*before, stage)) if scheme.threaded else (stage,)
    for example in scheme.first_examples(shown, category):
        for name in stages:
            earlier = stages[: stages.index(name)] if scheme.threaded else before
            turns += _asked(scheme, name, _dialogue(example), {one: example.steps[one] for one in earlier})
            turns.append(Message(role="assistant", content=example.steps[name]))
    asked: list[Message] = []
    for number, name in enumerate(before if scheme.threaded else ()):
        asked += _asked(scheme, name, question, {one: known[one] for one in before[:number]})
        asked.append(Message(role="assistant", content=known[name]))
    asked += _asked(scheme, stage, question, known)
    system = _system(scheme, stages[0], question)
    return Prompt(
        messages=(*system, *turns, *asked),
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=seed,
        frequency_penalty=settings.frequency_penalty,
        shared=_shared(scheme, system, turns),
    )


def check_prompt(
    scheme: Scheme, question: Sequence[Message], answer: str, settings: ChainSettings, seed: int
) -> Prompt:
    """The prompt of Safety Checking (section 3.1): which of the scheme's two verdicts an answer deserves.

    Each worked example shows a passing and a failing answer; their order changes from one example to the next, so that
    the verdicts do not simply alternate.
    """
    turns: list[Message] = []
    for number, example in enumerate(scheme.first_examples(settings.examples)):
        passing, failing = scheme.verdicts_of(example.category)
        shown = [(example.steps[scheme.answer], passing)]
        if example.unsafe_answer is not None:
            shown.append((example.unsafe_answer, failing))
        for text, verdict in reversed(shown) if number % 2 else shown:
            turns += _asked(scheme, CHECK, _dialogue(example), {"answer": text})
            turns.append(Message(role="assistant", content=verdict))
    system = _system(scheme, CHECK, question)
    messages = (*system, *turns, *_asked(scheme, CHECK, question, {"answer": answer}))
    return Prompt(messages, max_tokens=4, seed=seed, shared=_shared(scheme, system, turns))


def category_prompt(scheme: Scheme, category: str) -> Prompt:
    """The prompt that scores a question for a category: its heading, its example questions, "Write another one."."""
    listed = "\n".join(f"- {example.question}" for example in scheme.first_examples(len(scheme.examples), category))
    about = scheme.categories[category].about
    turn = Message(role="user", content=f"{about}\n{listed}\n\nWrite another one.")
    return Prompt((turn,), max_tokens=1, shared=1)


def as_text(messages: Sequence[Message]) -> str:
    """A dialogue as text: a single turn as it is, else each turn after its role."""
    if len(messages) == 1:
        return messages[0].content
    return "\n".join(f"{message.role.capitalize()}: {message.content}" for message in messages)


def _asked(scheme: Scheme, stage: str, messages: Sequence[Message], known: Mapping[str, str]) -> list[Message]:
    """The user turn that asks for a stage, after the dialogue's earlier turns if the stage continues the dialogue."""
    last = messages[-1].content
    turn = Message(role="user", content=scheme.render(stage, question=as_text(messages), last=last, **known))
    begins = scheme.continues_dialogue(stage) and not (scheme.threaded and known and stage != CHECK)
    earlier = [m for m in messages[:-1] if m.role != "system"] if begins else []
    return [*earlier, turn]


def _system(scheme: Scheme, stage: str, question: Sequence[Message]) -> tuple[Message, ...]:
    """The scheme's system prompt and, if the stage continues the dialogue, the question's, as one message."""
    own = [m.content for m in question if m.role == "system"] if scheme.continues_dialogue(stage) else []
    text = "\n\n".join(part for part in [scheme.system, *own] if part)
    return (Message(role="system", content=text),) if text else ()


def _shared(scheme: Scheme, system: Sequence[Message], examples: Sequence[Message]) -> int:
    """Number of leading messages shared by all questions: 0 if the question has its own system message."""
    scheme_only = not system or system[0].content == scheme.system
    return len(system) + len(examples) if scheme_only else 0


def _dialogue(example: Example) -> tuple[Message, ...]:
    earlier = [
        Message(role="assistant" if place % 2 else "user", content=text) for place, text in enumerate(example.earlier)
    ]
    return (*earlier, Message(role="user", content=example.question))
