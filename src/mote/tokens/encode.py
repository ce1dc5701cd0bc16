"""Text to token ids: prompts, chains with their labels, step markers and stop ids.

User text can never become a marker: the special tokens of a prompt come from the chat template alone.
"""

import re
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError

from mote.core.errors import UserError
from mote.core.records import ChainRow, Message, StepText
from mote.core.scheme import markers as marker_names
from mote.core.scheme import start_marker
from mote.models.embeddings import grow_embeddings
from mote.tokens.routing import Markers, step_ids

IGNORED = -100  # the label that the loss leaves out
_TOKENIZING = threading.Lock()


@dataclass(frozen=True)
class Tokens:
    """One training sequence.

    Attributes:
        ids: Prompt, then each step between its markers, then the end of the turn.
        labels: The ids from the first start marker on; `IGNORED` for the prompt.
        steps: Step id of each token, 0 for the question.
    """

    ids: list[int]
    labels: list[int]
    steps: list[int]


def add_markers(tokenizer: Any, config: Any, model: Any = None) -> None:
    """Add the step markers to a tokenizer, set their ids in a `MoteConfig`, and add embedding rows for them.

    Call it before `get_peft_model` to train an adapter; a trained adapter already contains all of this.

    Args:
        tokenizer: Gets a start and an end marker for each step as special tokens, unless it has them.
        config: The `MoteConfig`; `markers`, `turn_ids`, `end_of_turn` and `vocab_size` are set.
        model: The base model. Start markers' rows are initialised to that of the last token before an answer, end
            markers' rows to that of the end of a turn, so that the untrained model already begins and ends steps.
    """
    config.markers = _marker_ids(tokenizer, config.experts)
    config.turn_ids = turn_ids(tokenizer, model)
    config.end_of_turn = end_of_turn_id(tokenizer, model)
    config.vocab_size = len(tokenizer)
    if model is None:
        return
    grow_embeddings(model, [id_ for pair in config.markers.values() for id_ in pair], config.vocab_size)
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    before_answer = encode_prompt(tokenizer, (Message(role="user", content="?"),))[-1]
    with torch.no_grad():
        for weight in {id(layer.weight): layer.weight for layer in layers}.values():
            for start, end in config.markers.values():
                weight[start] = weight[before_answer]
                weight[end] = weight[config.end_of_turn]


def _marker_ids(tokenizer: Any, steps: tuple[str, ...]) -> dict[str, list[int]]:
    names = marker_names(steps)
    known = tokenizer.get_vocab()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [name for name in names if name not in known]},
        replace_extra_special_tokens=False,
    )
    ids = tokenizer.convert_tokens_to_ids(names)
    return {step: ids[2 * i : 2 * i + 2] for i, step in enumerate(steps)}


def stop_ids(tokenizer: Any, model: Any = None) -> tuple[int, ...]:
    """Ids that end an answer: the tokenizer's eos and those at which the model's own `generate` stops.

    Chat models often end their turn with another token than the tokenizer's eos, and name it in their generation config
    only (Gemma, Phi-3, early Llama-3-Instruct).

    Args:
        tokenizer: The base model's tokenizer.
        model: The base model, with or without an adapter, or its generation config.

    Returns:
        The ids, each once, the tokenizer's eos first; empty if there are none.
    """
    found = getattr(getattr(model, "generation_config", model), "eos_token_id", None)
    ends = found if isinstance(found, list | tuple) else [found]
    return tuple(dict.fromkeys(int(id_) for id_ in (tokenizer.eos_token_id, *ends) if id_ is not None))


def end_of_turn_id(tokenizer: Any, model: Any = None) -> int:
    """The stop id that the chat template puts behind an assistant's text; the tokenizer's eos if it puts none.

    Args:
        tokenizer: The base model's tokenizer.
        model: As in `stop_ids`.
    """
    stops = stop_ids(tokenizer, model)
    return next((id_ for id_ in _between_turns(tokenizer) if id_ in stops), tokenizer.eos_token_id)


def turn_ids(tokenizer: Any, model: Any = None) -> list[int]:
    """Special tokens that the chat template puts between an assistant turn and the next user turn.

    Args:
        tokenizer: The base model's tokenizer.
        model: As in `stop_ids`.
    """
    special = special_ids(tokenizer).intersection(_between_turns(tokenizer))
    # The end of a turn still belongs to its last step, unless nothing else marks the next turn (Vicuna's format).
    return sorted(special - set(stop_ids(tokenizer, model)) or special)


def _between_turns(tokenizer: Any) -> list[int]:
    """Ids that the chat template puts between an assistant's text and the next user's."""
    first, reply, last = (secrets.token_hex(16) for _ in range(3))  # words could also be in a default system prompt
    dialogue = [("user", first), ("assistant", reply), ("user", last)]
    text = _render(tokenizer, [Message(role=role, content=content) for role, content in dialogue], False)
    return _ids(tokenizer, text[text.index(reply) + len(reply) : text.index(last)])


def encode_prompt(tokenizer: Any, messages: tuple[Message, ...], *, think: bool = True) -> list[int]:
    """Ids of a dialogue with the generation prompt; see `encode_dialogue`.

    Args:
        tokenizer: The tokenizer.
        messages: The dialogue.
        think: False asks the templates of models that reason before they answer (Qwen3, SmolLM3, Granite, DeepSeek) for
            a reply without reasoning; other templates ignore it.
    """
    messages = tuple(message.model_copy(update={"content": message.content.strip()}) for message in messages)
    messages = _fold_system(tokenizer, messages)
    rows = [{"role": message.role, "content": message.content} for message in messages]
    return encode_dialogue(tokenizer, rows, None, lambda rows, tools: _render_rows(tokenizer, rows, True, think))


def opening_id(tokenizer: Any) -> int:
    """The token that the chat template opens every dialogue with."""
    return encode_prompt(tokenizer, (Message(role="user", content="?"),))[0]


def encode_dialogue(tokenizer: Any, dialogue: Any, tools: Any, render: Callable[[Any, Any], str]) -> list[int]:
    """Ids of a dialogue in which every special token comes from the chat template, never from a message's text.

    If the texts, or what the tokenizer's normaliser or the template makes of them, would add special tokens, each text
    is tokenised on its own as plain characters. All other dialogues give the ids of `apply_chat_template`.

    Args:
        tokenizer: The tokenizer.
        dialogue: Messages as chat templates take them: texts in any nesting of objects and lists.
        tools: Tools as chat templates take them, or None.
        render: Renders a dialogue and tools.
    """
    # A placeholder that no user can guess marks where each text goes; the parts around are the template's.
    texts: dict[str, str] = {}
    template = render(_hold(dialogue, texts), _hold(tools, texts))
    special = special_ids(tokenizer)
    ids = _ids(tokenizer, render(dialogue, tools))
    if [id_ for id_ in ids if id_ in special] == [id_ for id_ in _ids(tokenizer, template) if id_ in special]:
        return ids
    ids = []
    for part in re.split(f"({'|'.join(texts)})", template):
        ids += encode_text(tokenizer, texts[part]) if part in texts else _ids(tokenizer, part)
    return ids


def _hold(value: Any, texts: dict[str, str], key: str = "") -> Any:
    """The value with a placeholder for each text, except roles and types, which templates branch on."""
    if isinstance(value, dict):
        return {name: _hold(part, texts, name) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_hold(part, texts, key) for part in value]
    if not isinstance(value, str) or not value or (key in ("role", "type") and value.isidentifier()):
        return value
    holder = secrets.token_hex(16)
    texts[holder] = value
    return holder


def _fold_system(tokenizer: Any, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Move system messages into the next user turn if the chat template has no system role there.

    Such templates raise an error (Gemma, early Mistral) or drop the message silently.
    """
    if all(message.role != "system" for message in messages):
        return messages
    user = Message(role="user", content="?")
    allowed_first = _renders_system(tokenizer, ())
    allowed_later = _renders_system(tokenizer, (user, Message(role="assistant", content="!")))
    folded: list[Message] = []
    waiting: list[str] = []
    for index, message in enumerate(messages):
        if message.role == "system" and not (allowed_later if index else allowed_first):
            waiting.append(message.content)
        elif message.role == "user" and waiting:
            folded.append(message.model_copy(update={"content": "\n\n".join([*waiting, message.content])}))
            waiting = []
        else:
            folded.append(message)
    if waiting:
        folded.append(Message(role="user", content="\n\n".join(waiting)))
    return tuple(folded)


def _renders_system(tokenizer: Any, before: tuple[Message, ...]) -> bool:
    """Whether the chat template shows a system message that follows these messages."""
    holder = secrets.token_hex(16)
    dialogue = (*before, Message(role="system", content=holder), Message(role="user", content="?"))
    try:
        return holder in _render(tokenizer, dialogue, True)
    except TemplateError:
        return False


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of plain text; text that spells a special token is not encoded as one."""
    return _ids(tokenizer, text, plain=True)


def _ids(tokenizer: Any, text: str, plain: bool = False) -> list[int]:
    # `split_special_tokens` sets a switch on the tokenizer: another thread's call between the switch and the
    # tokenisation would turn a user's text into markers.
    with _TOKENIZING:
        ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]
    return ids


def encode_choice(tokenizer: Any, words: tuple[str, str]) -> tuple[list[int], tuple[int, int]] | None:
    """The common first ids of two words, and the first pair of ids that differ; None if no pair differs."""
    first, second = (encode_text(tokenizer, word) for word in words)
    for index, pair in enumerate(zip(first, second, strict=False)):
        if pair[0] != pair[1]:
            return first[:index], pair
    return None


def encode_chain(tokenizer: Any, chain: ChainRow, markers: Markers, experts: tuple[str, ...]) -> Tokens:
    """A chain as one training sequence (section 3.2: the loss is on the steps, given the question)."""
    prompt = encode_prompt(tokenizer, chain.messages)
    target = []
    for step in chain.steps:
        index = experts.index(step.name)
        target += [markers.starts[index], *encode_text(tokenizer, step.text), markers.ends[index]]
    target.append(tokenizer.eos_token_id if markers.end_of_turn is None else markers.end_of_turn)
    ids = prompt + target
    steps = step_ids(torch.tensor([ids]), markers)[0].tolist()
    # If the end of a turn also marks the next one, it would be routed as a question behind the answer.
    steps[-1] = steps[-2]
    return Tokens(ids=ids, labels=[IGNORED] * len(prompt) + target, steps=steps)


def encode_check(
    tokenizer: Any,
    messages: tuple[Message, ...],
    answer: tuple[str, str],
    verdict: tuple[str, str],
    markers: Markers,
    experts: tuple[str, ...],
) -> Tokens:
    """An answer with its verdict, p(c|y,x) of section 3.1; the loss is on the verdict and its end marker only.

    Args:
        tokenizer: Has the markers.
        messages: The dialogue.
        answer: Name and text of the judged step.
        verdict: Name of the checking step and its word.
        markers: Ids of the steps' markers.
        experts: Names of the steps, in the order of their ids.
    """
    ids = encode_prompt(tokenizer, messages)
    for name, text in (answer, verdict):
        index = experts.index(name)
        begin = len(ids) + 1
        ids += [markers.starts[index], *encode_text(tokenizer, text), markers.ends[index]]
    steps = step_ids(torch.tensor([ids]), markers)[0].tolist()
    return Tokens(ids=ids, labels=[IGNORED] * begin + ids[begin:], steps=steps)


def decode_steps(tokenizer: Any, ids: list[int], markers: Markers, experts: tuple[str, ...]) -> list[StepText]:
    """Split generated ids at their markers into the text of each step."""
    names = dict(zip(markers.starts, experts, strict=True))
    steps: list[tuple[str, list[int]]] = []
    for id_ in ids:
        if id_ in names:
            steps.append((names[id_], []))
        elif steps and id_ not in markers.ends:
            steps[-1][1].append(id_)
    return [StepText(name=name, text=tokenizer.decode(part, skip_special_tokens=True).strip()) for name, part in steps]


def check_markers(tokenizer: Any, markers: dict[str, list[int]]) -> None:
    """Check that a tokenizer has an adapter's markers at their ids.

    Raises:
        UserError: It has not: the adapter belongs to another tokenizer.
    """
    for step, (start, _) in markers.items():
        if tokenizer.convert_tokens_to_ids(start_marker(step)) != start:
            raise UserError(
                f"adapter: its marker {start_marker(step)} has id {start}, the tokenizer gives it another; load the "
                "tokenizer of the adapter's folder"
            )


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokens that only the chat template and the markers may produce."""
    return {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}


def _render(tokenizer: Any, messages: Any, generate: bool) -> str:
    return _render_rows(
        tokenizer, [{"role": message.role, "content": message.content} for message in messages], generate
    )


def _render_rows(tokenizer: Any, rows: Any, generate: bool, think: bool = True) -> str:
    switches = {} if think else {"enable_thinking": False, "thinking": False}
    text: str = tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=generate, **switches)
    return text
