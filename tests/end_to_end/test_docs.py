"""The pages say what the code does: settings, fields, commands, links and examples are compared with it."""

import ast
import importlib
import json
import re
import shlex
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
import pytest
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from support.docs import FENCE, blocks
from support.paths import ROOT

from mote.chains.judge import JudgeCard
from mote.cli import mote
from mote.cli.options import WithCommands
from mote.core.errors import UserError
from mote.core.recipe import Recipe, Shape
from mote.core.recipe_file import known_keys, load_recipe
from mote.core.records import Answer, AnswerTokens, ChainRow, ChainTokens, Check, LeftOut, Message, Question, StepText
from mote.evals.judges.agreement import Agreement, AgreementReport
from mote.evals.results import Comparison, Cost, EvalRow, Number, Summary, System
from mote.evals.statistics import Estimate, Paired
from mote.experiments.ablations import load_ablations
from mote.experiments.ablations.ablation_results import Interval, Judged, Line, Measured, Result
from mote.experiments.ablations.paper import Cell, PaperComparison, TableLine
from mote.report import summary
from mote.report.compare import Compared, Difference, Differing, Side, TwoReports
from mote.report.evaluation import Headline, Point
from mote.train import training_arguments

README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PLACEHOLDER = re.compile(r"^\{\{[A-Z_]+\}\}$", re.MULTILINE)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def section(page: Path, heading: str) -> str:
    """What stands under a heading, up to the next one."""
    _, found, rest = page.read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    assert found, f"{name_of(page)} has no section '## {heading}'"
    return re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def table(text: str) -> list[list[str]]:
    """Cells of the first table's rows, without its head."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows[2:]]


# --- what the pages should say of a pydantic model


def type_text(kind: Any) -> str:
    """A type as the pages write it."""
    if get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join("none" if part is type(None) else type_text(part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) in (tuple, list):
        return f"list of {type_text(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return f"object of {type_text(get_args(kind)[1])}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"`{kind.__name__}`"
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}[kind]


def limits_text(metadata: list[Any]) -> str:
    signs = ((Ge, "ge", ">="), (Gt, "gt", ">"), (Le, "le", "<="), (Lt, "lt", "<"))
    return "".join(f", {sign} {getattr(m, name):g}" for kind, name, sign in signs for m in metadata if type(m) is kind)


def settings(model: type[BaseModel], prefix: str = "") -> Iterator[list[str]]:
    """Name, type and default of every setting, in the order of the models."""
    for name, field in model.model_fields.items():
        if isinstance(field.default, BaseModel):
            yield from settings(type(field.default), f"{prefix}{name}.")
            continue
        default = "" if field.is_required() else f"`{json.dumps(field.default, ensure_ascii=False)}`"
        yield [f"`{prefix}{name}`", type_text(field.annotation) + limits_text(field.metadata), default]


def fields(model: type[BaseModel]) -> list[list[str]]:
    """Name and type of every field of a row, its own as well as those it inherits."""
    return [[f"`{name}`", type_text(field.annotation)] for name, field in model.model_fields.items()]


# --- docs/recipes.md


def test_every_setting_has_its_line_with_type_and_default() -> None:
    page = ROOT / "docs" / "recipes.md"
    rows = [row for part in ("Run", "Chains", "Experts", "Training", "Answers") for row in table(section(page, part))]
    assert [row[:3] for row in rows] == list(settings(Recipe))
    assert [row[:2] for row in table(section(page, "Shape"))] == [row[:2] for row in settings(Shape, "shape.")]
    for row in rows:
        assert len(row) == 5 and all(row[3:]), f"{row[0]} needs a meaning and a cost"


def test_a_setting_without_a_line_would_be_seen() -> None:
    class More(Recipe):
        unheard_of: int = 1

    assert [row for row in settings(More) if row not in list(settings(Recipe))] == [
        ["`unheard_of`", "whole number", "`1`"]
    ]
    keys = {row[0].strip("`") for row in settings(Recipe)}
    assert keys | {"chains", "experts", "train", "answer"} == {key for key in known_keys() if "shape." not in key}


def test_defaults_of_training_arguments_are_those_of_the_page() -> None:
    arguments = training_arguments(Recipe(seed=7), Path("runs"))
    rows = table(section(ROOT / "docs" / "recipes.md", "Anything else under `train`"))
    assert len(rows) > 3
    for argument, value, _ in rows:
        found = getattr(arguments, argument.strip("`"))
        assert found == (7 if value == "`seed`" else json.loads(value.strip("`"))), argument


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_opens_with_its_command_and_is_in_the_page(recipe: Path) -> None:
    first = recipe.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    command = re.search(rf"mote run recipes/{recipe.name}[^)]*", first)
    assert command, f"{recipe.name}: its first line is a comment with the command that runs it"
    parse(command[0].strip())
    assert f"recipes/{recipe.name}" in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")


# --- docs/files.md


ROWS = (Question, Message, LeftOut, ChainRow, StepText, Check, ChainTokens, Answer, AnswerTokens)
EVAL_ROWS = (EvalRow, System, Number, Estimate, Comparison, Paired, Cost)
TABLE_ROWS = (Result, Measured, Judged, Line, Interval, PaperComparison, TableLine, Cell)
JUDGE_ROWS = (JudgeCard, AgreementReport, Agreement)
REPORT_ROWS = (Headline, Point, TwoReports, Side, Differing, Compared, Difference)
ALL_ROWS = (*ROWS, *EVAL_ROWS, *TABLE_ROWS, *JUDGE_ROWS, *REPORT_ROWS)


@pytest.mark.parametrize("model", ALL_ROWS, ids=lambda m: m.__name__)
def test_every_field_of_a_row_has_its_line(model: type[BaseModel]) -> None:
    rows = table(section(ROOT / "docs" / "files.md", f"`{model.__name__}`"))
    inherited = fields(Question) if issubclass(model, Question) and model is not Question else []
    assert [row[:2] for row in rows] == [row for row in fields(model) if row not in inherited]
    assert all(row[2] for row in rows)


def test_every_key_of_an_evaluations_summary_has_its_line() -> None:
    rows = table(section(ROOT / "docs" / "files.md", "`summary.json`"))
    assert [row[0] for row in rows] == [f"`{name}`" for name in Summary.model_fields]


def test_every_key_of_the_report_has_its_line() -> None:
    def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
        for name, field in model.model_fields.items():
            if field.exclude:
                continue
            yield f"`{prefix}{name}`"
            inner = [part for part in (field.annotation, *get_args(field.annotation)) if isinstance(part, type)]
            for part in inner:
                if issubclass(part, BaseModel) and part not in (*EVAL_ROWS, *JUDGE_ROWS, *REPORT_ROWS):
                    yield from keys(part, f"{prefix}{name}.")

    rows = table(section(ROOT / "docs" / "files.md", "`report.json`"))
    assert [row[0] for row in rows] == list(keys(summary.Report))


# --- docs/cli.md and the command lines of all pages


def commands(group: click.Group = mote, prefix: str = "") -> dict[str, click.Command]:
    """All commands by the words they are called with; a group stands for those in it."""
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        words = f"{prefix}{name}"
        found |= commands(command, f"{words} ") if isinstance(command, click.Group) else {words: command}
        if isinstance(command, WithCommands):
            found |= {f"{words} {inner}": own for inner, own in command.commands.items()}
    return found


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_and_option_has_its_line(name: str) -> None:
    command = commands()[name]
    text = section(ROOT / "docs" / "cli.md", f"`mote {name}`")
    options = [p for p in command.params if isinstance(p, click.Option)]
    spelt = [", ".join(f"`{o}`" for o in (*option.opts, *option.secondary_opts)) for option in options]
    assert [row[0] for row in table(text)] == spelt
    for argument in (p for p in command.params if isinstance(p, click.Argument)):
        assert str(argument.make_metavar(click.Context(command))) in text


def parse(line: str) -> None:
    """Parse a `mote` command line as the program would, up to where the command begins its work."""
    program, *words = shlex.split(line, comments=True)
    assert program == "mote"
    words = [word for word in words if word != "--debug"]
    context = mote.make_context("mote", words, resilient_parsing=not words or words[0].startswith("-"))
    if not context._protected_args and not context.args:
        return
    name, *rest = [*context._protected_args, *context.args]
    command = mote.get_command(context, name)
    assert command is not None, f"no command '{name}'"
    if {"-h", "--help"} & set(rest):
        return
    while isinstance(command, click.Group) and rest:
        name, *rest = rest
        command = command.commands[name]
    parsed = command.make_context(name, rest, parent=context)
    recipe = parsed.params.get("recipe")
    overrides = parsed.params.get("overrides", ())
    if name == "ablations":
        settings = load_ablations(ROOT / recipe, overrides).recipe
    else:
        settings = load_recipe(ROOT / recipe if recipe else None, overrides)
    training_arguments(settings, Path("runs"))


def command_lines() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for _, block in blocks(page, "bash"):
            joined = block.replace("\\\n", " ")
            found += [(name_of(page), line) for line in joined.splitlines() if line.startswith("mote ")]
    return found


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_command_line_is_one_that_mote_takes(page: str, line: str) -> None:
    parse(line)


def test_there_are_command_lines_of_every_command() -> None:
    lines = [line.split() for _, line in command_lines()]
    assert not [name for name in commands() if not any(line[1:][: len(name.split())] == name.split() for line in lines)]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("mote fly", "fly"),
        ("mote run", "RECIPE"),
        ("mote train --speed 3", "--speed"),
        ("mote run recipes/quickstart.yaml train.skip=0", "unknown setting 'train.skip'"),
        ("mote run recipes/quickstart.yaml limti=3", "did you mean 'limit'"),
    ],
)
def test_a_wrong_command_line_would_be_seen(line: str, complaint: str) -> None:
    with pytest.raises((AssertionError, click.UsageError, UserError)) as found:
        parse(line)
    error = found.value
    said = error.format_message() if isinstance(error, click.UsageError) else str(error)
    assert complaint in said


def test_make_targets_are_there() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE))
        assert named <= targets, f"{name_of(page)} names {named - targets}"


# --- links, names and files


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if there.suffix == ".png" and PLACEHOLDER.search(README.read_text(encoding="utf-8")):
            continue  # the picture comes with the measured numbers
        assert there.exists(), f"{name_of(page)} links to {target}"
        assert not anchor or anchor in anchors(there), f"{name_of(page)} links to {target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_names_of_the_code_are_there(page: Path) -> None:
    text = prose(page)
    for path in re.findall(r"`((?:src|tests|recipes|docs|benchmarks)/[\w./-]+\.\w+)", text):
        assert (ROOT / path).exists(), f"{name_of(page)} names {path}"
    for path, test in re.findall(r"`(tests/\w+/\w+\.py)::(\w+)", text):
        assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), f"{name_of(page)} names {path}::{test}"
    for dotted in re.findall(r"`(mote(?:\.\w+)+)(?:\(\))?`", text):
        assert resolve(dotted) is not None, f"{name_of(page)} names {dotted}"


def resolve(dotted: str) -> Any:
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    return None


@pytest.mark.parametrize("page", DECISIONS, ids=lambda path: path.stem)
def test_decision_has_its_parts(page: Path) -> None:
    titles = re.findall(r"^## (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert titles == ["Context", "Decision", "Consequence", "How it is tested"]


def test_decisions_are_numbered_listed_and_those_the_code_names() -> None:
    numbers = [page.name[:4] for page in DECISIONS]
    assert numbers == sorted(set(numbers))
    index = (ROOT / "docs" / "decisions" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((.*?\.md)\)", index) == [page.name for page in DECISIONS]
    for path in (ROOT / "src").rglob("*.py"):
        for number in re.findall(r"decisions/(\d{4})", path.read_text(encoding="utf-8")):
            assert number in numbers, f"{path.name} names decision {number}"


# --- Python


def test_python_blocks_compile() -> None:
    for page in PAGES:
        for _, block in blocks(page, "python"):
            ast.parse(block, filename=name_of(page))


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "peft.md"], ids=name_of)
def test_python_blocks_that_are_marked_run(
    page: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, as a reader would type them, on the tiny model."""
    code = [block for runs, block in blocks(page, "python") if runs]
    assert len(code) >= 2
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for block in code:
        exec(block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tiny)), namespace)
