"""The shape of the code: folders, sizes, no circle of imports, tests that stand alone."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from support.paths import ROOT

PACKAGE = ROOT / "src" / "mote"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
# Each part may import those to its right; a test below reads the same order in pyproject.toml.
ORDER = (
    "cli > experiments > report > evals | serve > train | inference > tuner > chains | tokens > "
    "questions | models > core"
)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path, modules: set[str]) -> Iterator[str]:
    """Modules of the package that a file names in an import, for types and inside of functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mote"):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in modules else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others."""

    def reach(start: str) -> set[str]:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            for following in graph[waiting.pop()] - found:
                found.add(following)
                waiting.append(following)
        return found

    reached = {module: reach(module) for module in graph}
    groups = {tuple(sorted(m for m in reached[module] if module in reached[m])) for module in graph}
    return [list(group) for group in sorted(groups) if group]


def test_a_circle_of_imports_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []


def test_no_file_imports_itself_through_others() -> None:
    modules = {module_of(path) for path in SOURCES}
    graph = {module_of(path): set(imported(path, modules)) & modules - {module_of(path)} for path in SOURCES}
    # `import mote` registers the method with PEFT and reaches the parts by name, on first use.
    graph["mote"] = set()
    assert circles(graph) == []


def test_the_import_order_is_the_nine_lines() -> None:
    contract = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition('type = "layers"')[2].partition("]")[0]
    layers = re.findall(r'"(.*?)"', contract)
    assert " > ".join(layer.replace("mote.", "") for layer in layers) == ORDER
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(re.findall(r"\w+", ORDER))


def test_the_top_level_is_small() -> None:
    entries = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 15, sorted(entries)


def test_files_and_functions_are_short() -> None:
    long = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > 450:
            long.append(module_of(path))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno >= 60:
                    long.append(f"{module_of(path)}.{node.name}")
    assert long == []


def test_shape_letters_are_those_of_the_legend() -> None:
    """The legend is the table of CONTRIBUTING.md; a module's docstring repeats the letters it uses."""
    legend = set(re.findall(r"\| ([A-Z]) \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    used = 0
    for path in SOURCES:
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        letters = set(re.findall(r"\b([A-Z])\b", doc.partition("Shapes:")[2]))
        assert letters <= legend, f"{module_of(path)} uses {sorted(letters - legend)}; see CONTRIBUTING.md"
        used += bool(letters)
    assert used > 20


def test_no_test_module_imports_another() -> None:
    for path in TESTS:
        found = re.findall(r"^\s*(?:from|import) (test_\w+|conftest)\b", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert not found, f"{path.relative_to(ROOT)} imports {found}; put what they share into tests/support"


def test_tests_lie_in_the_folder_of_their_source() -> None:
    folders = {path.parent.name for path in TESTS if path.name.startswith("test_")}
    assert folders == set(re.findall(r"\w+", ORDER)) | {"end_to_end"}


def test_names_of_tests_are_short() -> None:
    names = [name for path in TESTS for name in re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8"))]
    assert len(names) > 900
    assert [name for name in names if len(name) > 60] == []
