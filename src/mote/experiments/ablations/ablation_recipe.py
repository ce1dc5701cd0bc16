"""The recipe of ablations, checked before anything starts (docs/training.md)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from mote.core.errors import UserError, first_line
from mote.core.methods import METHODS, steps_of
from mote.core.recipe import MethodName, Recipe
from mote.core.recipe_file import load_recipe
from mote.core.records import Strict
from mote.core.scheme import ADAPTIVE, BASE, load_scheme
from mote.evals.suite_config import TaskName
from mote.experiments.ablations.figures import paper_table

# Keys that `key=value` sets here and not in the shared recipe, with what may be given for them.
_OWN = {
    "recipe": "the path of a recipe",
    "seeds": "whole numbers, as in seeds=[0,1,2]",
    "tasks": "tasks, as in tasks=[xstest]",
}


class Variant(Strict):
    """One row of the table.

    Attributes:
        name: Its name in the table and of its folder.
        kind: `trained`; `prompted`: the base model answers with the prompts of the variant's `scheme`; `chains`: only
            statistics of the chains are reported.
        method: The training method.
        settings: Overrides of the recipe's settings; with another `scheme` the variant gets its own chains.
        chains: A separate chains file.
        replies: Whether the human replies in the `questions` file are trained on instead of the chains.
    """

    name: str = Field(pattern=r"^[\w .,+>-]+$")
    kind: Literal["trained", "prompted", "chains"] = "trained"
    method: MethodName = "mote"
    settings: dict[str, Any] = Field({})
    chains: str | None = None
    replies: bool = False

    @property
    def folder(self) -> str:
        """Name of the variant's folder."""
        return "-".join(self.name.lower().replace(",", " ").replace("->", " ").split())

    @property
    def own_scheme(self) -> bool:
        """Whether its chains are made with another scheme than the shared recipe's."""
        return "scheme" in self.settings


class Ablations(Strict):
    """Variants of one recipe, compared over several seeds.

    Attributes:
        name: Name of the comparison.
        recipe: The shared recipe with its overrides.
        seeds: Each variant is trained once per seed; untrained variants use the first.
        variants: In the order of the table.
        tasks: Tasks of the suite `paper` to evaluate; without them only lengths and refusals are reported.
        table: Table or figure of the paper to compare with (figures.yaml).
    """

    name: str
    recipe: Recipe
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    variants: tuple[Variant, ...] = Field(min_length=1)
    tasks: tuple[TaskName, ...] = ()
    table: str | None = None

    @field_validator("variants")
    @classmethod
    def _distinct_folders(cls, variants: tuple[Variant, ...]) -> tuple[Variant, ...]:
        folders = [variant.folder for variant in variants]
        if double := next((folder for folder in folders if folders.count(folder) > 1), None):
            raise ValueError(f"two variants share the folder '{double}'; rename one")
        return variants

    def runs(self) -> list[tuple[Variant, Recipe]]:
        """Each variant with each of its seeds, as a resolved recipe.

        Raises:
            UserError: A variant's settings cannot work.
        """
        return [
            (variant, recipe_of(self, variant, seed))
            for variant in self.variants
            for seed in (self.seeds if variant.kind == "trained" else self.seeds[:1])
        ]


def load_ablations(path: Path, overrides: Sequence[str] = ()) -> Ablations:
    """Read a recipe of ablations: `recipe` (a path next to it), `settings` that override it, the fields of `Ablations`.

    Args:
        path: The YAML file.
        overrides: `key=value` settings of the shared recipe, which win over the file's; `recipe`, `seeds` and `tasks`
            replace the file's own, and `recipe` is then relative to the working directory.

    Raises:
        UserError: The file is missing or invalid.
    """
    own = {key: value for key, _, value in (one.partition("=") for one in overrides) if key in _OWN}
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        shared = path.parent / data.pop("recipe")
        settings = data.pop("settings", {})
        if "recipe" in own:
            shared = Path(own["recipe"])
        data |= {key: yaml.safe_load(value) for key, value in own.items() if key != "recipe"}
        given = ["eval=false"]  # `tasks` are the evaluation
        given += [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        given += [override for override in overrides if override.partition("=")[0] not in _OWN]
        wanted = Ablations(**data, recipe=load_recipe(shared, given))
    except OSError as error:
        raise UserError(f"recipe: {path} cannot be read ({error.strerror}); recipes/paper/ has some") from error
    except (yaml.YAMLError, ValidationError, TypeError, AttributeError, KeyError) as error:
        if isinstance(error, ValidationError) and (key := str(error.errors()[0]["loc"][0])) in own:
            raise UserError(f"{key}: '{own[key]}' is not valid; give {_OWN[key]}") from error
        raise UserError(f"recipe: {path} is not a recipe of ablations: {first_line(error)}") from error
    if wanted.table is not None:
        paper_table(wanted.table)  # an unknown name must not fail after hours of training
    return wanted


def recipe_of(wanted: Ablations, variant: Variant, seed: int) -> Recipe:
    """The shared recipe with the variant's method and settings, restricted to the modes that it can answer in.

    Raises:
        UserError: The settings cannot work.
    """
    data = wanted.recipe.model_dump(mode="json")
    for key, value in {"train.method": variant.method, "seed": seed, **variant.settings}.items():
        *parents, leaf = key.split(".")
        part = data
        for parent in parents:
            part = part.get(parent, {})
        part[leaf] = value
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise UserError(f"recipe: the variant '{variant.name}': {first_line(error)}") from error
    scheme = load_scheme(recipe.scheme)
    if variant.kind == "prompted" and len(scheme.depths) > 1:
        raise UserError(
            f"recipe: the variant '{variant.name}': scheme={recipe.scheme} has several chains; prompting alone takes a "
            "scheme with one"
        )
    if variant.kind != "trained":
        return recipe
    steps = steps_of(recipe, scheme)
    possible = set(scheme.only(steps).modes_of(steps)) - {BASE}
    if METHODS[variant.method].separate:
        possible -= {ADAPTIVE}
    modes = tuple(mode for mode in recipe.answer.modes if mode in possible)
    if not modes:
        raise UserError(
            f"recipe: answer.modes={list(recipe.answer.modes)}: '{variant.name}' can answer in none of them"
        )
    return recipe.model_copy(update={"answer": recipe.answer.model_copy(update={"modes": modes})})
