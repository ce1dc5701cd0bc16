"""The pages say what the code does: settings, fields, commands, links and examples are compared with it."""

import ast
import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
from compatibility import RESULTS
from generate_tables import TABLE, commands, description, generated
from pydantic import BaseModel
from support.docs import FENCE, blocks
from support.paths import ROOT

from mote.chains.judge import JudgeCard
from mote.cli import mote
from mote.core.errors import UserError
from mote.core.recipe import Recipe
from mote.core.recipe_file import known_keys, load_recipe
from mote.core.records import Answer, AnswerTokens, ChainRow, ChainTokens, Check, LeftOut, Message, Question, StepText
from mote.evals.judges.agreement import Agreement, AgreementReport
from mote.evals.results import Comparison, Cost, EvalRow, Number, Summary, System
from mote.evals.statistics import Estimate, Paired
from mote.experiments.ablations import load_ablations
from mote.experiments.ablations.ablation_results import Interval, Judged, Line, Measured, Result
from mote.experiments.ablations.paper import Cell, PaperComparison, TableLine
from mote.report.compare import Compared, Difference, Differing, Side, TwoReports
from mote.report.contents import Report
from mote.report.evaluation import Headline, Point
from mote.train import training_arguments

README = ROOT / "README.md"
WORDS = 35_000
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PLACEHOLDER = re.compile(r"^\{\{[A-Z_]+\}\}$", re.MULTILINE)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def section(page: Path, heading: str) -> str:
    """The text of a section, up to the next heading."""
    _, found, rest = page.read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    assert found, f"{name_of(page)} has no section '## {heading}'"
    return re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def table(text: str) -> list[list[str]]:
    """Cells of the first table's rows, without its head."""
    return [cells(line) for line in text.splitlines() if line.startswith("|")][2:]


def all_tables(page: Path) -> list[list[str]]:
    return [cells(line) for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]


# --- docs/recipes.md


@pytest.mark.parametrize("name", ["recipes.md", "files.md", "cli.md", "gpu.md"])
def test_generated_tables_are_those_of_the_code(name: str) -> None:
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert TABLE.search(page)
    assert generated(page) == page, "run `make docs`"


def test_a_changed_description_changes_its_page() -> None:
    page = "<!-- settings: mote.core.recipe.Shape shape. -->\n<!-- end -->"
    assert "| `shape.layers` | integer, >= 1 | required | Transformer blocks |" in generated(page)


def test_every_setting_has_a_line_with_a_meaning() -> None:
    rows = {row[0].strip("`"): row for row in all_tables(ROOT / "docs" / "recipes.md") if len(row) >= 4}
    settings = [key for key in known_keys() if key not in ("chains", "experts", "train", "answer", "eval")]
    assert not [key for key in settings if key not in rows]
    assert not [key for key in settings if not all(rows[key])]


def test_a_field_without_description_is_an_error() -> None:
    class More(Recipe):
        unheard_of: int = 1

    with pytest.raises(ValueError, match="unheard_of has no description"):
        description(More, "unheard_of")


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


@pytest.mark.parametrize("model", [*ROWS, *EVAL_ROWS, *TABLE_ROWS, *JUDGE_ROWS, *REPORT_ROWS], ids=lambda m: m.__name__)
def test_every_field_of_a_row_has_its_line(model: type[BaseModel]) -> None:
    rows = table(section(ROOT / "docs" / "files.md", f"`{model.__name__}`"))
    inherited = Question.model_fields if issubclass(model, Question) and model is not Question else {}
    assert [row[0] for row in rows] == [f"`{name}`" for name in model.model_fields if name not in inherited]
    assert all(row[2] for row in rows)


@pytest.mark.parametrize(("name", "model"), [("summary.json", Summary), ("report.json", Report)])
def test_every_key_of_a_json_file_has_its_line(name: str, model: type[BaseModel]) -> None:
    rows = [row[0] for row in table(section(ROOT / "docs" / "files.md", f"`{name}`"))]
    keys = [f"`{key}`" for key, field in model.model_fields.items() if not field.exclude]
    assert [row for row in rows if "." not in row] == keys


# --- docs/cli.md and the command lines of all pages


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


def test_readme_is_short_and_names_each_folder() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    folders = sorted(path.parent.name for path in (ROOT / "src" / "mote").glob("*/__init__.py"))
    assert sorted(m[1] for line in lines if (m := re.match(r"  (\w+)/ +\w.*", line))) == folders


def test_pages_are_short_beside_results_and_tables() -> None:
    pages = [page for page in ROOT.glob("docs/**/*.md") if "results" not in page.parts]
    prose = [RESULTS.sub("", TABLE.sub("", page.read_text(encoding="utf-8"))) for page in pages]
    assert sum(len(text.split()) for text in prose) <= WORDS


def test_every_page_is_reached_from_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(([\w/-]+\.md)\)", index))
    pages = {
        str(page.relative_to(ROOT / "docs")) for page in [*ROOT.glob("docs/*.md"), *ROOT.glob("docs/results/*.md")]
    }
    assert pages - {"README.md"} <= linked


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
    assert code
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for block in code:
        exec(block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tiny)), namespace)
