"""docs/compatibility.md lists the private interfaces that the code uses, each with a test that exists."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from compatibility import results
from support.paths import ROOT

PAGE = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
SOURCES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "src").rglob("*.py"))}
LIBRARIES = ("transformers", "peft", "trl", "torch", "accelerate", "gguf", "vllm")
DOCUMENTED = {"torch.nn.attention.flex_attention", "torch.autograd.function", "torch.nn.functional"}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names() -> set[str]:
    """Names that the code defines itself, and the methods of named tuples."""
    names = {"_replace"}
    for tree in SOURCES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif (
                isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name)
            ):
                names |= {node.attr} if node.value.id == "self" else set()
    return names


def used() -> Iterator[str]:
    """Private attributes of others' objects, and modules and private names imported from inside libraries."""
    own = own_names()
    for tree in SOURCES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own:
                yield node.attr
            elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in LIBRARIES:
                library, _, module = node.module.partition(".")
                if module and library == "vllm":
                    yield f"vllm.{module.partition('.')[0]}"
                elif module and library != "torch" and node.module not in DOCUMENTED:
                    yield module
                yield from (alias.name for alias in node.names if private(alias.name))


def test_private_interfaces_are_listed() -> None:
    missing = sorted({name for name in used() if name not in PAGE})
    assert not missing, f"name these in docs/compatibility.md, each with its test: {missing}"


def test_the_tests_that_watch_them_exist() -> None:
    _, _, table = PAGE.partition("## Private interfaces")
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert named <= defined, sorted(named - defined)
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert rows and all("`test_" in row for row in rows)


def test_the_versions_are_those_of_pyproject_and_constraints() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = [
        *project["dependencies"],
        *project["optional-dependencies"]["dev"],
        *project["optional-dependencies"]["eval"],
    ]
    pinned = dict(
        re.findall(r"^([\w.-]+)==(.*)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    )
    top_table, _, _ = PAGE.partition("## ")
    for name in ("torch", "transformers", "peft", "trl", "datasets", "inspect-ai"):
        [(lowest, tested, newest)] = re.findall(rf"^\| {name} \| (\S+) \| (\S+) \| (\S+) \|$", top_table, re.MULTILINE)
        [need] = {need for need in needs if re.match(rf"{name}[<>=]", need)}
        assert f">={lowest}" in need and tested == pinned[name.replace("-", "_")]
        top = need.partition("<")[2]
        assert not top or [int(n) for n in newest.split(".")[:2]] < [int(n) for n in top.split(".")[:2]]


def test_the_last_report_of_a_test_counts(tmp_path: Path) -> None:
    reports = []
    for commit, outcome in [("a1", "<failure/>"), ("b2", "")]:
        reports.append(tmp_path / f"newest-{commit}" / "models.xml")
        reports[-1].parent.mkdir()
        reports[-1].write_text(
            f'<testsuite><testcase classname="tests.models.test_rope" name="test_it">{outcome}</testcase>'
            '<testcase classname="" name="tests.serve.test_vllm"><skipped/></testcase></testsuite>'
        )
    table, failed = results(reports[:1])
    assert failed == ["test_it"] and "| models | 0 | 1 | 0 |" in table and "; commit a1:" in table
    table, failed = results(reports)
    assert not failed and "| models | 1 | 0 | 0 |\n| serve | 0 | 0 | 1 |" in table and "; commit a1, b2:" in table
