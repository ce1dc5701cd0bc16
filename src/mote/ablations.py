"""Several methods and seeds on the same chains: trained, answered with, and measured, each in a run folder of its own.

A recipe of ablations names a recipe that all variants share, the seeds, and the variants; see docs/training.md.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mote.ablations_table import Measured, Result, markdown, summary_of
from mote.config import MethodName, Recipe, load_recipe
from mote.errors import UserError
from mote.files import write_atomic, write_json
from mote.importing import import_chains
from mote.judges.protocol import COMPLIANCE
from mote.judges.rule import classify, find_signs
from mote.machine import environment
from mote.methods import METHODS, steps_of
from mote.records import Answer, ChainRow, read_rows, rewrite_rows
from mote.run import Run
from mote.steps import ADAPTIVE, BASE, first_line, load_scheme


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Variant(_Strict):
    """One line of the table.

    Attributes:
        name: Its name in the table, and of its folder.
        method: What is trained.
        settings: `key: value` settings of the recipe that differ.
        chains: A chains file of its own.
        replies: A file that `mote chains import` reads, such as HH-RLHF's: its replies to the questions of the chains
            are trained on instead.
    """

    name: str = Field(pattern=r"^[\w .,+-]+$")
    method: MethodName = "mote"
    settings: dict[str, Any] = {}
    chains: str | None = None
    replies: str | None = None

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return "-".join(self.name.lower().replace(",", " ").split())


class Ablations(_Strict):
    """What is compared.

    Attributes:
        name: Name of the comparison.
        recipe: The recipe that all variants share, with its overrides.
        seeds: Each variant is trained once with each.
        variants: In the order of the table.
    """

    name: str
    recipe: Recipe
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    variants: tuple[Variant, ...] = Field(min_length=1)

    @field_validator("variants")
    @classmethod
    def _named_apart(cls, variants: tuple[Variant, ...]) -> tuple[Variant, ...]:
        folders = [variant.folder for variant in variants]
        if double := next((folder for folder in folders if folders.count(folder) > 1), None):
            raise ValueError(f"two variants share the folder '{double}'; name them apart")
        return variants


def load_ablations(path: Path, overrides: Sequence[str] = ()) -> Ablations:
    """Read a recipe of ablations: `name`, `recipe` (a path beside it), `settings`, `seeds`, `variants`.

    Args:
        path: The YAML file.
        overrides: `key=value` settings of the shared recipe, above those of the file.

    Raises:
        UserError: The file is missing or says what cannot be.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        shared, settings = path.parent / data.pop("recipe"), data.pop("settings", {})
        given = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        return Ablations(**data, recipe=load_recipe(shared, [*given, *overrides]))
    except OSError as error:
        raise UserError(f"recipe: {path} cannot be read ({error.strerror}); recipes/ablations/ has some") from error
    except (yaml.YAMLError, ValidationError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"recipe: {path} is not a recipe of ablations: {first_line(error)}") from error


def run_ablations(wanted: Ablations, folder: Path) -> Result:
    """Make the shared chains, then train, answer and measure every variant with every seed; what is there is reused.

    Args:
        wanted: What is compared.
        folder: Gets `shared/` with the chains, `<variant>/seed-<n>/` run folders, `ablations.json` and `ablations.md`.

    Raises:
        UserError: A setting cannot work, or the folder holds other runs.
    """
    recipes = {
        (variant.name, seed): _recipe_of(wanted, variant, seed) for variant in wanted.variants for seed in wanted.seeds
    }
    from mote.train import check_settings  # a wrong setting must not wait for the chains

    for recipe in recipes.values():
        check_settings(recipe, load_scheme(recipe.scheme), folder)
    shared = folder / "shared"
    if any(variant.chains is None for variant in wanted.variants):
        Run(wanted.recipe, shared).chains()
    rows = []
    for number, ((name, seed), recipe) in enumerate(recipes.items(), 1):
        variant = next(variant for variant in wanted.variants if variant.name == name)
        print(f"ablations: {number}/{len(recipes)}, {name}, seed {seed}", file=sys.stderr)
        run = Run(recipe, folder / variant.folder / f"seed-{seed}")
        run.answer(run.train(_chains_of(variant, shared / "chains.jsonl", run)))
        rows.append(_measure(variant, recipe, run.folder))
        result = Result(name=wanted.name, seeds=wanted.seeds, rows=tuple(rows), summary=summary_of(rows))
        write_json(folder / "ablations.json", {**result.model_dump(mode="json"), "environment": environment()})
        write_atomic(folder / "ablations.md", markdown(result))
    return result


def _recipe_of(wanted: Ablations, variant: Variant, seed: int) -> Recipe:
    """The shared recipe with the variant's method and settings, and the modes that it can answer in."""
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
    possible = set(scheme.only(steps := steps_of(recipe, scheme)).modes_of(steps)) - {BASE}
    if METHODS[variant.method].apart:
        possible -= {ADAPTIVE}
    modes = tuple(mode for mode in recipe.answer.modes if mode in possible)
    if not modes:
        raise UserError(
            f"recipe: answer.modes={list(recipe.answer.modes)}: '{variant.name}' can answer in none of them"
        )
    return recipe.model_copy(update={"answer": recipe.answer.model_copy(update={"modes": modes})})


def _chains_of(variant: Variant, shared: Path, run: Run) -> Path:
    source = Path(variant.chains) if variant.chains else shared
    if not source.exists():
        raise UserError(f"chains: {source} of the variant '{variant.name}' does not exist")
    if variant.replies is None:
        return source
    path, folder = run.folder / "chains.jsonl", run.folder / "replies"
    if not folder.exists():
        import_chains(Path(variant.replies), folder)
    given = {row.id: row for row in read_rows(folder / "chains.jsonl", ChainRow)}
    rows = [row for row in read_rows(source, ChainRow) if row.id in given]
    # What is rejected stays so, that both train on the same questions.
    rewrite_rows(path, [row.model_copy(update={"steps": given[row.id].steps, "checks": ()}) for row in rows])
    return path


def _measure(variant: Variant, recipe: Recipe, folder: Path) -> Measured:
    """What there is of a finished run: trained parameters, held-out losses, lengths and refusals."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    held_out = [row for row in metrics if "eval_loss" in row]
    # Where training stopped early, the best weights were kept, else the last.
    keeps_best = recipe.train.early_stopping_patience or (recipe.train.model_extra or {}).get("load_best_model_at_end")
    kept = min(held_out, key=lambda row: float(row["eval_loss"])) if keeps_best else held_out[-1] if held_out else {}
    losses = {key: value for key, value in kept.items() if key.startswith("eval_loss")}
    measures = {f"loss {key.removeprefix('eval_loss').lstrip('_') or 'all'}": value for key, value in losses.items()}
    for path in sorted((folder / "answers").glob("*.jsonl")):
        answers = read_rows(path, Answer)
        mode = answers[0].mode
        measures[f"tokens {mode}"] = mean(answer.tokens.total for answer in answers)
        for kind in ("harmful", "benign"):
            of_kind = [answer for answer in answers if answer.kind == kind]
            if of_kind:
                measures[f"refused {kind} {mode}"] = mean(_declines(answer) for answer in of_kind)
    return Measured(
        variant=variant.name,
        method=variant.method,
        seed=recipe.seed,
        trained_parameters=metrics[0]["trained_parameters"],
        measures=measures,
    )


def _declines(answer: Answer) -> bool:
    """Whether an answer refuses, wholly or in part, by the offline rule (docs/decisions/0022)."""
    return classify(find_signs(answer.text, answer.answer)) != COMPLIANCE
