"""The reasoning scheme: which steps there are, in which order, and which chains of them are allowed.

A scheme is data: a YAML file with its steps, its prompt templates and its examples. A new domain is a new file. This
module knows nothing of models or tokenizers.
"""

import hashlib
from collections.abc import Iterable
from functools import cached_property
from importlib import resources
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mote.errors import UserError

Chain = tuple[str, ...]  # the names of a chain's steps, in order

BASE = "base"
ADAPTIVE = "adaptive"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ignored_types=(cached_property,))


class Example(_Strict):
    """One worked example of a scheme: a question and what each stage writes for it."""

    question: str
    steps: dict[str, str]
    unsafe_answer: str | None = None


class Scheme(_Strict):
    """Steps in order, the chains that may be made of them, and the prompts that make them.

    Attributes:
        name: Name of the scheme.
        depths: Mode name -> steps of a chain, from the shortest chain to the deepest (section 3.1: a chain is as long
            as the question needs). Every chain ends with `answer`.
        answer: The step that the user reads.
        system: System prompt of the stages, empty for none.
        templates: Stage -> prompt template; `check` is Safety Checking, the others are steps of the scheme.
        examples: Worked examples for few-shot prompts.
        sha256: Content hash of the file the scheme was read from; chains carry it, so that prompts never mix.
    """

    name: str
    depths: dict[str, Chain]
    answer: str = "response"
    system: str = ""
    templates: dict[str, str]
    examples: tuple[Example, ...] = ()
    sha256: str = Field(default="", exclude=True)

    @model_validator(mode="after")
    def _consistent(self) -> "Scheme":
        if not self.depths:
            raise ValueError("depths: name at least one chain")
        for mode, chain in self.depths.items():
            if not chain or chain[-1] != self.answer:
                raise ValueError(f"depths.{mode}: a chain ends with '{self.answer}', this one is {list(chain)}")
            order = [self.steps.index(step) for step in chain]
            if order != sorted(set(order)):
                raise ValueError(f"depths.{mode}: steps keep the order {list(self.steps)}, these are {list(chain)}")
        missing = [stage for stage in (*self.steps, "check") if stage not in self.templates]
        if missing:
            raise ValueError(f"templates: no template for {missing}")
        return self

    @cached_property
    def steps(self) -> Chain:
        """All steps in order: those of the deepest chain."""
        return max(self.depths.values(), key=len)

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes a trained model can answer in."""
        return (BASE, *self.depths, ADAPTIVE)

    def check_mode(self, mode: str) -> None:
        """Make sure that a mode is one of the scheme's.

        Raises:
            UserError: It is not.
        """
        if mode != BASE:
            self.chains_of(mode)

    def chains_of(self, mode: str) -> tuple[Chain, ...]:
        """The chains a mode allows: one where the mode forces it, all of them in adaptive mode.

        Raises:
            UserError: The mode is not one of the scheme's, or it is `base`, which has no steps.
        """
        if mode == ADAPTIVE:
            return tuple(self.depths.values())
        if mode not in self.depths:
            raise UserError(f"mode: '{mode}' is not a mode of the scheme '{self.name}'; use one of {list(self.modes)}")
        return (self.depths[mode],)


def start_marker(step: str) -> str:
    """The special token that opens a step."""
    return f"<|{step}|>"


def end_marker(step: str) -> str:
    """The special token that closes a step."""
    return f"<|/{step}|>"


def markers(steps: Iterable[str]) -> list[str]:
    """Start and end markers of the steps, in the order in which they get their token ids."""
    return [marker for step in steps for marker in (start_marker(step), end_marker(step))]


def load_scheme(name: str) -> Scheme:
    """Read a scheme that ships with the package by its name, or any other from a path to a YAML file.

    Raises:
        UserError: No such scheme, or the file is not a valid one.
    """
    shipped = resources.files("mote") / "prompts"
    path = Path(name) if name.endswith((".yaml", ".yml")) else None
    try:
        data = path.read_bytes() if path else (shipped / f"{name}.yaml").read_bytes()
        return Scheme(**yaml.safe_load(data), sha256=hashlib.sha256(data).hexdigest())
    except OSError as error:
        known = sorted(entry.name.removesuffix(".yaml") for entry in shipped.iterdir() if entry.name.endswith(".yaml"))
        raise UserError(
            f"scheme: '{name}' cannot be read ({error.strerror}); use one of {known} or a path to a .yaml file"
        ) from error
    except (yaml.YAMLError, TypeError, ValidationError) as error:
        raise UserError(f"scheme: '{name}' is not a valid scheme file: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The message of an error as one line; of a pydantic error, its first complaint with the setting's path."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return f"{where}: {first['msg']}" if where else first["msg"]
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
