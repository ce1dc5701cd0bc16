"""The reasoning scheme: the steps, their order, and the chains of steps that are allowed.

A scheme is data, a YAML file with steps, prompt templates and worked examples; a new domain is a new file
(docs/schemes.md). This module knows nothing about models or tokenizers.
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
CHECKED = "adaptive+check"  # adaptive decoding in which the trained check judges the answer
CHECK = "check"  # the stage of Safety Checking
LABELS = ("harmful", "benign")  # kinds that a question file may give
_QUESTION, _LAST, _ANSWER = "question", "last", "answer"  # variables of templates besides the earlier stages
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_TEMPLATES = ImmutableSandboxedEnvironment(autoescape=False, undefined=StrictUndefined)


class Example(Strict):
    """One worked example of a scheme: a question and the text of each stage.

    Attributes:
        question: The last user turn.
        earlier: The turns before it, user and assistant alternating.
        steps: Stage -> its text.
        unsafe_answer: An answer that the check must not pass, shown in the check's prompt.
        category: Which of the scheme's `categories` the question belongs to; None if the scheme has none.
    """

    question: str = Field(min_length=1)
    earlier: tuple[str, ...] = ()
    steps: dict[str, str]
    unsafe_answer: str | None = None
    category: str | None = Field(None, serialization_alias="kind")  # see `Scheme.prompts_hash`


class Category(Strict):
    """One category of questions: its prompts show worked examples of this category only.

    With `about` a question's category is inferred (decisions/0036); without it, it is the question's label, `harmful`
    or `benign` (decisions/0042).

    Attributes:
        about: Heading of the list of example questions; the category whose list makes a question likeliest is chosen.
        margin: Lead over the next category, in nats per token, that makes the choice sure.
        asks: Regular expression that must be found in the last user turn; None accepts any turn.
        forms: Stage -> regular expression that the whole text must match.
        closed: Stages that restate the question and add few words of their own.
        bare: Stages that are prompted without worked examples, after the chain's own earlier steps.
        passes: The verdict that accepts an answer to such a question; None for the scheme's first.
        deepest: Regular expression; a question in whose `source` it is found gets the deepest chain at once; None for
            no question.
    """

    about: str = ""
    margin: float = Field(0.0, ge=0)
    asks: str | None = None
    forms: dict[str, str] = Field({})
    closed: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    passes: str | None = None
    deepest: str | None = None


class Scheme(Strict):
    """The steps, the chains that they form, and the prompts of each stage.

    Attributes:
        name: Name of the scheme.
        depths: Mode -> steps of its chain, from the shortest chain to the deepest. With several depths a chain is as
            long as its question needs (section 3.1). Every chain ends with `answer`.
        stages: Mode -> stages generated for this depth, if more than its chain: for instance a draft and its critique,
            which later stages read and which are not trained on.
        answer: The step that the user reads.
        system: System prompt of all stages; empty for none.
        templates: Stage -> jinja2 prompt template; `check` is Safety Checking, without which every answer is accepted.
        verdicts: The two words the check chooses between: the passing one, then the failing one.
        categories: Categories that questions are sorted into before anything is generated; empty for no sorting.
        bare: Whether the shortest chain's answer is prompted without worked examples, as the model answers by itself.
        threaded: Whether the stages of a chain are asked for in one dialogue, turn after turn, so that each prompt
            extends the one before and the KV cache holds it; templates of later stages need not show the question.
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
    bare: bool = False
    threaded: bool = False
    examples: tuple[Example, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> "Scheme":
        self._check_depths()
        self._check_templates()
        self._check_categories()
        for number, example in enumerate(self.examples, 1):
            if set(example.steps) != set(self.all_stages):
                raise ValueError(
                    f"examples: number {number} has the steps {list(example.steps)}, "
                    f"and not those of the scheme, {list(self.all_stages)}"
                )
            if len(example.earlier) % 2:
                raise ValueError(
                    f"examples: number {number} has {len(example.earlier)} earlier turns; give each user turn its reply"
                )
        return self

    def _check_depths(self) -> None:
        for mode, chain in self.depths.items():
            if mode in (BASE, ADAPTIVE, CHECKED):
                raise ValueError(f"depths.{mode}: this name is reserved for a mode of every scheme; use another one")
            if not chain or chain[-1] != self.answer:
                raise ValueError(f"depths.{mode}: a chain ends with '{self.answer}', this one is {list(chain)}")
            if not _is_subsequence(chain, self.steps):
                raise ValueError(f"depths.{mode}: steps must keep the order {list(self.steps)}, not {list(chain)}")
        for mode, stages in self.stages.items():
            if mode not in self.depths:
                raise ValueError(f"stages.{mode}: there is no such depth; use one of {list(self.depths)}")
            if not _is_subsequence(stages, self.all_stages) or not _is_subsequence(self.depths[mode], stages):
                raise ValueError(
                    f"stages.{mode}: {list(stages)} must keep the order {list(self.all_stages)} and hold the depth's "
                    f"chain {list(self.depths[mode])}"
                )
        for stage in self.all_stages:
            if not _NAME.fullmatch(stage) or stage in (CHECK, _QUESTION, _LAST):
                raise ValueError(
                    f"depths: '{stage}' cannot name a step; use lower-case letters, digits and '_', and none of "
                    f"{[CHECK, _QUESTION, _LAST]}"
                )

    def _check_templates(self) -> None:
        if missing := [stage for stage in self.all_stages if stage not in self.templates]:
            raise ValueError(f"templates: no template for {missing}")
        if unknown_stages := [stage for stage in self.templates if stage not in (*self.all_stages, CHECK)]:
            raise ValueError(
                f"templates: {unknown_stages} are no steps of the scheme; remove them or name them in depths"
            )
        if len(self.depths) > 1 and not self.checked:
            raise ValueError(
                f"templates: without a '{CHECK}' nothing chooses among {len(self.depths)} depths; add one or keep one "
                "depth"
            )
        if self.verdicts[0] == self.verdicts[1] or not all(map(_NAME.fullmatch, self.verdicts)):
            raise ValueError(f"verdicts: {list(self.verdicts)} are not two different words in lower case")
        for stage in self.templates:
            known = (_ANSWER,) if stage == CHECK else self.all_stages[: self.all_stages.index(stage)]
            try:
                variables = self._variables(stage)
            except TemplateError as error:
                raise ValueError(f"templates.{stage}: not a jinja2 template ({first_line(error)})") from error
            if unknown := sorted(variables - {_QUESTION, _LAST, *known}):
                raise ValueError(f"templates.{stage}: knows no {unknown}; use {[_QUESTION, _LAST, *known]}")
            begins = not self.threaded or stage in (CHECK, *(self.stages_of(mode)[0] for mode in self.depths))
            if begins and not variables & {_QUESTION, _LAST}:
                raise ValueError(f"templates.{stage}: shows neither {{{{ question }}}} nor {{{{ last }}}}; add one")
        if self.checked and _ANSWER not in self._variables(CHECK):
            raise ValueError(f"templates.{CHECK}: does not show {{{{ answer }}}}; add it")

    def _check_categories(self) -> None:
        if len(self.categories) == 1:
            raise ValueError(f"categories: {list(self.categories)} is the only one; give two or more, or none")
        for number, example in enumerate(self.examples, 1):
            if example.category not in (self.categories or {None}):
                known = list(self.categories) if self.categories else [None]
                raise ValueError(f"examples: number {number} has the category {example.category!r}; use one of {known}")
        if len({bool(category.about) for category in self.categories.values()}) > 1:
            raise ValueError("categories: some have `about` and some have not; give it to all of them, or to none")
        if self.categories and not self.infers_categories and not set(self.categories) <= set(LABELS):
            raise ValueError(
                f"categories: {list(self.categories)} are not all labels of questions; use {list(LABELS)}, or give "
                "each an `about`"
            )
        for name, category in self.categories.items():
            if category.passes not in (None, *self.verdicts):
                raise ValueError(
                    f"categories.{name}.passes: '{category.passes}' is no verdict; use one of {list(self.verdicts)}"
                )
            if not any(example.category == name for example in self.examples):
                raise ValueError(f"categories.{name}: no example has this category; add one")
            named = (*category.forms, *category.closed, *category.bare)
            if unknown := [stage for stage in named if stage not in self.all_stages]:
                raise ValueError(f"categories.{name}: {unknown} are no stages; use {list(self.all_stages)}")
            patterns = {f"forms.{stage}": pattern for stage, pattern in category.forms.items()}
            patterns |= {"asks": category.asks or "", "deepest": category.deepest or ""}
            for where, pattern in patterns.items():
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(f"categories.{name}.{where}: not a regular expression ({error})") from error

    @cached_property
    def steps(self) -> Chain:
        """All steps in order: those of the deepest chain."""
        return max(self.depths.values(), key=len)

    @cached_property
    def all_stages(self) -> Chain:
        """All generated stages in order: the steps, and drafts that are not kept."""
        return max((self.stages_of(mode) for mode in self.depths), key=len)

    @property
    def checked(self) -> bool:
        """Whether the model checks its own answers."""
        return CHECK in self.templates

    @property
    def infers_categories(self) -> bool:
        """Whether a question's category is inferred from its wording; otherwise it is the question's label."""
        return any(category.about for category in self.categories.values())

    def verdicts_of(self, category: str | None) -> tuple[str, str]:
        """The verdict that accepts an answer to a question of this category, and the other one."""
        first, second = self.verdicts
        passes = self.categories[category].passes if category in self.categories else None
        return (second, first) if passes == second else (first, second)

    def stages_of(self, mode: str) -> Chain:
        """The stages generated for a depth, in order."""
        return self.stages.get(mode, self.depths[mode])

    def continues_dialogue(self, stage: str) -> bool:
        """Whether a stage is the dialogue's next turn (its template uses `last`) instead of reading it as text."""
        return stage in self._continuing

    def render(self, stage: str, **values: str) -> str:
        """The user turn that asks the model for a stage.

        Args:
            stage: A stage, or `check`.
            values: `question` (the dialogue as text), `last` (its last turn), and the earlier stages or the answer.
                Stages that are not given are empty.
        """
        return self._compiled[stage].render(dict.fromkeys(self.all_stages, "") | values)

    def first_examples(self, count: int, category: str | None = None) -> tuple[Example, ...]:
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
        # Fields that came later count only if they are used.
        for field in ("bare", "threaded"):
            if not content[field]:
                del content[field]
        for category in content.get("kinds", {}).values():
            for field in ("passes", "deepest"):
                if category[field] is None:
                    del category[field]
            if not category["bare"]:
                del category["bare"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _compiled(self) -> dict[str, Template]:
        return {stage: _TEMPLATES.from_string(text) for stage, text in self.templates.items()}

    @cached_property
    def _continuing(self) -> frozenset[str]:
        return frozenset(stage for stage in self.templates if _LAST in self._variables(stage))

    def _variables(self, stage: str) -> set[str]:
        """The variables that a stage's template uses."""
        _TEMPLATES.from_string(self.templates[stage])  # raises on unknown filters; parsing alone does not
        return find_undeclared_variables(_TEMPLATES.parse(self.templates[stage]))

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes of every trained model."""
        return (BASE, *self.depths, ADAPTIVE)

    def modes_of(self, experts: Chain) -> tuple[str, ...]:
        """The modes of a model with these experts; a trained check adds `adaptive+check`."""
        return (*self.modes, CHECKED) if CHECK in experts else self.modes

    def only(self, steps: Chain) -> "Scheme":
        """The scheme with only the chains that consist of these steps.

        Raises:
            UserError: There is no such chain.
        """
        depths = {mode: chain for mode, chain in self.depths.items() if set(chain) <= set(steps)}
        if not depths:
            raise UserError(f"scheme: '{self.name}' has no chain of the steps {list(steps)} alone")
        stages = {mode: chain for mode, chain in self.stages.items() if mode in depths}
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        # Not validated: the examples still have all steps.
        return Scheme.model_construct(**{**fields, "depths": depths, "stages": stages})

    def check_mode(self, mode: str, experts: Chain) -> None:
        """Check that a model with these experts has a mode.

        Raises:
            UserError: It does not.
        """
        known = self.modes_of(experts)
        if mode == CHECKED and mode not in known:
            raise UserError(
                f"mode: '{mode}' needs an adapter with a trained check, this one has the experts {list(experts)}; "
                f"train with train.method=four-experts, or use '{ADAPTIVE}'"
            )
        if mode not in known:
            raise UserError(f"mode: '{mode}' is not a mode of the scheme '{self.name}'; use one of {list(known)}")

    def chains_of(self, mode: str) -> tuple[Chain, ...]:
        """The chains a mode allows: all in the adaptive modes, else the one of that name.

        Raises:
            UserError: The scheme has no such mode, or it is `base`, which has no steps.
        """
        if mode in (ADAPTIVE, CHECKED):
            return tuple(self.depths.values())
        if mode not in self.depths:
            raise UserError(f"mode: '{mode}' is not a mode of the scheme '{self.name}'; use one of {list(self.modes)}")
        return (self.depths[mode],)


def _is_subsequence(part: Chain, whole: Chain) -> bool:
    """Whether `part` is a subsequence of `whole` without repetition."""
    return len(set(part)) == len(part) and list(part) == [name for name in whole if name in part]


def start_marker(step: str) -> str:
    """The special token that opens a step."""
    return f"<|{step}|>"


def end_marker(step: str) -> str:
    """The special token that closes a step."""
    return f"<|/{step}|>"


def markers(steps: Iterable[str]) -> list[str]:
    """Start and end markers of the steps, in the order of their token ids."""
    return [marker for step in steps for marker in (start_marker(step), end_marker(step))]


def _with_categories(content: dict[str, Any], name: str) -> dict[str, Any]:
    """A scheme file in which earlier names, `kinds` and an example's `kind`, are replaced by today's."""
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
    """Read a scheme of the package by its name, or another one from the path of a YAML file.

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
