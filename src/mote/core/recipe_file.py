"""Recipe files and `key=value` overrides (`train.learning_rate=1e-4`) -> a checked `Recipe`, and back to YAML.

Every error names the setting, the value and the remedy.
"""

import difflib
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from mote.core.errors import UserError
from mote.core.recipe import Recipe


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
