"""The reasoning scheme: which steps there are, in which order, and which chains of them are allowed.

A scheme is data: a YAML file with its steps, its prompt templates and its examples. A new domain is a new file. This
module knows nothing of models or tokenizers.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterable
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import Field, ValidationError, model_validator

from mote.core.errors import UserError, first_line
from mote.core.records import Strict

Chain = tuple[str, ...]  # the names of a chain's steps, in order
BASE = "base"
ADAPTIVE = "adaptive"
CHECKED = "adaptive+check"  # adaptive, and the trained check judges the answer
CHECK = "check"  # the stage of Safety Checking
_QUESTION, _LAST, _ANSWER = "question", "last", "answer"  # what templates may show beside the steps so far
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_TEMPLATES = ImmutableSandboxedEnvironment(autoescape=False, undefined=StrictUndefined)


class Example(Strict):
    """One worked example of a scheme: a question and what each stage writes for it.

    Attributes:
        question: The last user turn.
        earlier: The turns before it, the user's and the assistant's by turns.
        steps: What is written in each stage.
        unsafe_answer: An answer that the check must not let through, for the check's own examples.
        category: Which of the scheme's `categories` the question belongs to; None if the scheme has none.
    """

    question: str = Field(min_length=1)
    earlier: tuple[str, ...] = ()
    steps: dict[str, str]
    unsafe_answer: str | None = None
    category: str | None = Field(None, serialization_alias="kind")  # see `Scheme.prompts_hash`


class Category(Strict):
    """One category of questions (decisions/0036): its prompts show worked examples of this category only.

    Attributes:
        about: Heading of the list of example questions; the category whose list makes a question likeliest is chosen.
        margin: Lead over the next category, in nats per token, that makes the choice sure.
        asks: Regular expression that must be found in the last user turn; None accepts any turn.
        forms: Stage -> regular expression that the whole text must match.
        closed: Stages that restate the question and add few words of their own.
    """

    about: str = Field(min_length=1)
    margin: float = Field(0.0, ge=0)
    asks: str | None = None
    forms: dict[str, str] = Field({})
    closed: tuple[str, ...] = ()


class Scheme(Strict):
    """Steps in order, the chains that may be made of them, and the prompts that make them.

    Attributes:
        name: Name of the scheme.
        depths: Mode name -> steps of a chain, from the shortest chain to the deepest. With several, a chain is as long
            as its question needs (section 3.1); with one, every chain is that one. Every chain ends with `answer`.
        stages: Mode name -> what is written for this depth, where that is more than its chain: for instance a draft and
            its critique, which later stages read and nobody is trained on.
        answer: The step that the user reads.
        system: System prompt of the stages, empty for none.
        templates: Stage -> prompt template; `check` is Safety Checking, without which every answer is taken.
        verdicts: The words the check chooses between, for an answer that passes and one that does not.
        categories: Categories that questions are sorted into before anything is generated; empty for no sorting.
        examples: Worked examples for few-shot prompts.
    """

    name: str = Field(min_length=1)
    depths: dict[str, Chain] = Field(min_length=1)
    stages: dict[str, Chain] = Field({})
    answer: str = "response"
    system: str = ""
    templates: dict[str, str]
    verdicts: tuple[str, str] = ("safe", "unsafe")
    categories: dict[str, Category] = Field({}, serialization_alias="kinds")  # see `prompts_hash`
    examples: tuple[Example, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> "Scheme":
        self._check_depths()
        self._check_templates()
        self._check_categories()
        for number, example in enumerate(self.examples, 1):
            if set(example.steps) != set(self.written):
                raise ValueError(f"examples: number {number} has the steps {list(example.steps)}, "
                                 f"and not those of the scheme, {list(self.written)}")  # fmt: skip
            if len(example.earlier) % 2:
                raise ValueError(f"examples: number {number} has {len(example.earlier)} earlier turns; "
                                 "give each user turn its reply")  # fmt: skip
        return self

    def _check_depths(self) -> None:
        for mode, chain in self.depths.items():
            if mode in (BASE, ADAPTIVE, CHECKED):
                raise ValueError(f"depths.{mode}: this name has a meaning of its own; use another one")
            if not chain or chain[-1] != self.answer:
                raise ValueError(f"depths.{mode}: a chain ends with '{self.answer}', this one is {list(chain)}")
            if not _in_order(chain, self.steps):
                raise ValueError(f"depths.{mode}: steps keep the order {list(self.steps)}, these are {list(chain)}")
        for mode, stages in self.stages.items():
            if mode not in self.depths:
                raise ValueError(f"stages.{mode}: there is no such depth; use one of {list(self.depths)}")
            if not _in_order(stages, self.written) or not _in_order(self.depths[mode], stages):
                raise ValueError(f"stages.{mode}: {list(stages)} must keep the order {list(self.written)} and hold the "
                                 f"depth's chain {list(self.depths[mode])}")  # fmt: skip
        for stage in self.written:
            if not _NAME.fullmatch(stage) or stage in (CHECK, _QUESTION, _LAST):
                raise ValueError(f"depths: '{stage}' cannot name a step; use lower-case letters, digits and '_', and "
                                 f"none of {[CHECK, _QUESTION, _LAST]}")  # fmt: skip

    def _check_templates(self) -> None:
        if missing := [stage for stage in self.written if stage not in self.templates]:
            raise ValueError(f"templates: no template for {missing}")
        if strange := [stage for stage in self.templates if stage not in (*self.written, CHECK)]:
            raise ValueError(f"templates: {strange} are no steps of the scheme; remove them or name them in depths")
        if len(self.depths) > 1 and not self.checked:
            raise ValueError(f"templates: without a '{CHECK}' nothing chooses among {len(self.depths)} depths; add one "
                             "or keep one depth")  # fmt: skip
        if self.verdicts[0] == self.verdicts[1] or not all(map(_NAME.fullmatch, self.verdicts)):
            raise ValueError(f"verdicts: {list(self.verdicts)} are not two different words in lower case")
        for stage in self.templates:
            known = (_ANSWER,) if stage == CHECK else self.written[: self.written.index(stage)]
            try:
                shown = self._shown(stage)
            except TemplateError as error:
                raise ValueError(f"templates.{stage}: not a jinja2 template ({first_line(error)})") from error
            if unknown := sorted(shown - {_QUESTION, _LAST, *known}):
                raise ValueError(f"templates.{stage}: knows no {unknown}; use {[_QUESTION, _LAST, *known]}")
            if not shown & {_QUESTION, _LAST}:
                raise ValueError(f"templates.{stage}: shows neither {{{{ question }}}} nor {{{{ last }}}}; add one")
        if self.checked and _ANSWER not in self._shown(CHECK):
            raise ValueError(f"templates.{CHECK}: does not show {{{{ answer }}}}; add it")

    def _check_categories(self) -> None:
        if len(self.categories) == 1:
            raise ValueError(f"categories: {list(self.categories)} is the only one; give two or more, or none")
        for number, example in enumerate(self.examples, 1):
            if example.category not in (self.categories or {None}):
                known = list(self.categories) if self.categories else [None]
                raise ValueError(f"examples: number {number} has the category {example.category!r}; use one of {known}")
        for name, category in self.categories.items():
            if not any(example.category == name for example in self.examples):
                raise ValueError(f"categories.{name}: no example has this category; add one")
            if unknown := [stage for stage in (*category.forms, *category.closed) if stage not in self.written]:
                raise ValueError(f"categories.{name}: {unknown} are no stages of the scheme; use {list(self.written)}")
            patterns = {f"forms.{stage}": pattern for stage, pattern in category.forms.items()}
            for where, pattern in {"asks": category.asks or "", **patterns}.items():
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(f"categories.{name}.{where}: not a regular expression ({error})") from error

    @cached_property
    def steps(self) -> Chain:
        """All steps in order: those of the deepest chain."""
        return max(self.depths.values(), key=len)

    @cached_property
    def written(self) -> Chain:
        """All stages in order: the steps, and what is written on the way to them and not kept."""
        return max((self.stages_of(mode) for mode in self.depths), key=len)

    @property
    def checked(self) -> bool:
        """Whether the model checks its own answers."""
        return CHECK in self.templates

    def stages_of(self, mode: str) -> Chain:
        """What is written for a depth, in order."""
        return self.stages.get(mode, self.depths[mode])

    def goes_on(self, stage: str) -> bool:
        """Whether a stage is the next turn of the dialogue itself (its template shows `last`) or reads it as text."""
        return stage in self._going_on

    def render(self, stage: str, **values: str) -> str:
        """The user turn that asks for a stage.

        Args:
            stage: A step, or `check`.
            values: `question` (the dialogue as text), `last` (its last turn), and the steps so far or the answer. Steps
                that are not given are empty.
        """
        return self._compiled[stage].render(dict.fromkeys(self.written, "") | values)

    def shown(self, count: int, category: str | None = None) -> tuple[Example, ...]:
        """The first `count` worked examples, of one category if it is given."""
        return tuple(example for example in self.examples if category in (None, example.category))[:count]

    def prompts_hash(self, examples: int) -> str:
        """Hash of what the prompts contain: the whole scheme, with the first `examples` worked examples.

        In a scheme with categories all examples count, because the questions of all of them decide the category.
        The serialised names (`kinds`, `kind`) are those of earlier versions, so that their chains keep their hash.
        """
        if self.categories:
            content = self.model_dump(mode="json", by_alias=True) | {"shown": examples}
        else:
            shown = [example.model_dump(exclude={"category"}) for example in self.examples[:examples]]
            content = self.model_dump(mode="json", exclude={"categories"}) | {"examples": shown}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _compiled(self) -> dict[str, Template]:
        return {stage: _TEMPLATES.from_string(text) for stage, text in self.templates.items()}

    @cached_property
    def _going_on(self) -> frozenset[str]:
        return frozenset(stage for stage in self.templates if _LAST in self._shown(stage))

    def _shown(self, stage: str) -> set[str]:
        """The variables that a stage's template shows."""
        _TEMPLATES.from_string(self.templates[stage])  # finds unknown filters, which parsing alone does not
        return find_undeclared_variables(_TEMPLATES.parse(self.templates[stage]))

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes that every trained model can answer in."""
        return (BASE, *self.depths, ADAPTIVE)

    def modes_of(self, experts: Chain) -> tuple[str, ...]:
        """The modes of a model with these experts: with a trained check it can also judge its own answers."""
        return (*self.modes, CHECKED) if CHECK in experts else self.modes

    def only(self, steps: Chain) -> "Scheme":
        """The scheme with the chains that need no other steps than these.

        Raises:
            UserError: No chain is left.
        """
        depths = {mode: chain for mode, chain in self.depths.items() if set(chain) <= set(steps)}
        if not depths:
            raise UserError(f"scheme: '{self.name}' has no chain of the steps {list(steps)} alone")
        stages = {mode: chain for mode, chain in self.stages.items() if mode in depths}
        kept = {name: getattr(self, name) for name in type(self).model_fields}
        return Scheme.model_construct(**{**kept, "depths": depths, "stages": stages})  # its examples write all steps

    def check_mode(self, mode: str, experts: Chain) -> None:
        """Make sure that a model with these experts has a mode.

        Raises:
            UserError: It has not.
        """
        known = self.modes_of(experts)
        if mode == CHECKED and mode not in known:
            raise UserError(f"mode: '{mode}' needs an adapter with a trained check, this one has the experts "
                            f"{list(experts)}; train with train.method=four-experts, or use '{ADAPTIVE}'")  # fmt: skip
        if mode not in known:
            raise UserError(f"mode: '{mode}' is not a mode of the scheme '{self.name}'; use one of {list(known)}")

    def chains_of(self, mode: str) -> tuple[Chain, ...]:
        """The chains a mode allows: one where the mode forces it, all of them in the adaptive ones.

        Raises:
            UserError: The mode is not one of the scheme's, or it is `base`, which has no steps.
        """
        if mode in (ADAPTIVE, CHECKED):
            return tuple(self.depths.values())
        if mode not in self.depths:
            raise UserError(f"mode: '{mode}' is not a mode of the scheme '{self.name}'; use one of {list(self.modes)}")
        return (self.depths[mode],)


def _in_order(part: Chain, whole: Chain) -> bool:
    """Whether the names are some of the whole's, each once and in its order."""
    return len(set(part)) == len(part) and list(part) == [name for name in whole if name in part]


def start_marker(step: str) -> str:
    """The special token that opens a step."""
    return f"<|{step}|>"


def end_marker(step: str) -> str:
    """The special token that closes a step."""
    return f"<|/{step}|>"


def markers(steps: Iterable[str]) -> list[str]:
    """Start and end markers of the steps, in the order in which they get their token ids."""
    return [marker for step in steps for marker in (start_marker(step), end_marker(step))]


def _with_categories(content: dict[str, Any], name: str) -> dict[str, Any]:
    """A scheme file with the names of today: `kinds` and an example's `kind` are earlier names of categories."""
    if "kinds" not in content:
        return content
    if content["kinds"]:  # adapters of earlier versions carry an empty one
        print(f"scheme: '{name}': 'kinds' is now 'categories', and 'kind' of an example is 'category'", file=sys.stderr)
    content = {("categories" if key == "kinds" else key): value for key, value in content.items()}
    examples = content.get("examples")
    if isinstance(examples, list) and all(isinstance(example, dict) for example in examples):
        content["examples"] = [
            {("category" if key == "kind" else key): value for key, value in example.items()} for example in examples
        ]
    return content


def load_scheme(name: str) -> Scheme:
    """Read a scheme that ships with the package by its name, or any other from a path to a YAML file.

    Raises:
        UserError: No such scheme, or the file is not a valid one.
    """
    shipped = resources.files("mote.core") / "schemes"
    path = Path(name) if name.endswith((".yaml", ".yml")) else None
    try:
        data = path.read_bytes() if path else (shipped / f"{name}.yaml").read_bytes()
        content = yaml.safe_load(data)
        if not isinstance(content, dict):
            raise UserError(f"scheme: '{name}' holds a {type(content).__name__}, not a scheme; see docs/schemes.md")
        return Scheme.model_validate(_with_categories(content, name))
    except OSError as error:
        known = sorted(entry.name.removesuffix(".yaml") for entry in shipped.iterdir() if entry.name.endswith(".yaml"))
        raise UserError(
            f"scheme: '{name}' cannot be read ({error.strerror}); use one of {known} or a path to a .yaml file"
        ) from error
    except yaml.YAMLError as error:
        where = f"line {mark.line + 1} " if (mark := getattr(error, "problem_mark", None)) else ""
        raise UserError(f"scheme: '{name}' {where}is not valid YAML ({getattr(error, 'problem', error)})") from error
    except ValidationError as error:
        raise UserError(f"scheme: '{name}' is not a valid scheme file: {first_line(error)}") from error
