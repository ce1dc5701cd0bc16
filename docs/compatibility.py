"""What `make test-newest` installs, and what it writes into `docs/compatibility.md`.

    python docs/compatibility.py packages            # the dependencies without their versions
    python docs/compatibility.py results REPORT.xml ...  # fills the table of results from pytest's JUnit reports

Exits 1 if a test failed that the page does not name.
"""

import re
import sys
import tomllib
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "inspect-ai", "openai", "bitsandbytes")
OUTCOMES = ("failure", "error", "skipped")
RESULTS = re.compile(r"(<!-- results -->\n).*?(<!-- end -->)", re.DOTALL)


def packages() -> list[str]:
    """Names of all dependencies, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.split(r"[<>=;, ]", needed, maxsplit=1)[0] for group in lists for needed in group}
    return sorted(name for name in names if not name.startswith(project["name"]))


def results(reports: list[Path]) -> tuple[str, list[str]]:
    """The table of results, and the names of the tests that failed; of a test in several reports the last counts."""
    found = {}
    for case in (case for report in reports for case in ElementTree.parse(report).iter("testcase")):
        outcome = next((name for name in OUTCOMES if case.find(name) is not None), "passed")
        outcome = "failed" if outcome in ("failure", "error") else outcome
        module = case.attrib["classname"] or case.attrib["name"]  # no class: a module that was skipped as a whole
        found[module, case.attrib["name"]] = outcome
    counts: dict[str, Counter[str]] = {}
    for (module, _), outcome in found.items():
        counts.setdefault(module.split(".")[1], Counter())[outcome] += 1
    failed = [name for (_, name), outcome in found.items() if outcome == "failed"]
    counts["all"] = sum(counts.values(), Counter())
    commits = dict.fromkeys(report.parent.name.removeprefix("newest-") for report in reports)
    lines = [", ".join(f"{name} {version(name)}" for name in LIBRARIES) + f"; commit {', '.join(commits)}:", ""]
    lines += ["| Tests | Passed | Failed | Skipped |", "|---|---|---|---|"]
    lines += [f"| {name} | {c['passed']} | {c['failed']} | {c['skipped']} |" for name, c in sorted(counts.items())]
    return "\n".join(lines), failed


def write_results(reports: list[Path]) -> list[str]:
    """Fill the page's table; returns the failed tests that the page does not name."""
    table, failed = results(reports)
    page = RESULTS.sub(lambda m: f"{m[1]}\n{table}\n\n{m[2]}", PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(page, encoding="utf-8")
    return [name for name in failed if name.partition("[")[0] not in page]


if __name__ == "__main__":
    if sys.argv[1] == "packages":
        print(*packages())
    elif unknown := write_results([Path(name) for name in sys.argv[2:]]):
        sys.exit(f"failed: {', '.join(unknown)}")
