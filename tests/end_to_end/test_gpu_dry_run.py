"""`benchmarks/gpu.py` on the CPU, with nothing installed but what a GPU machine has (the Makefile's lists)."""

import importlib
import json
import os
import re
import subprocess
import venv
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from support.paths import ROOT

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")


def listed(name: str) -> list[str]:
    """The distributions of a list in the Makefile, without their versions."""
    found = re.search(rf"^{name} = (.*)$", MAKEFILE, re.MULTILINE)
    assert found
    return [word.partition("==")[0] for word in found[1].split()]


def with_requirements(names: list[str]) -> set[str]:
    """Distributions with all that they require."""
    done: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        for text in metadata.requires(name) or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                waiting.append(needed.name)
    return done


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that sees these distributions of this environment and no others."""
    folder = tmp_path_factory.mktemp("machine")
    venv.create(folder, symlinks=True)
    [site] = folder.glob("lib/python*/site-packages")
    for name in with_requirements(listed("GPU_STACK")) | set(listed("GPU_WHEELS")):
        for file in metadata.distribution(name).files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(Path(str(metadata.distribution(name).locate_file(top))))
    return folder / "bin" / "python"


def script() -> Any:
    """benchmarks/gpu.py as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module("gpu")


def run(python: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [str(python), str(ROOT / "benchmarks" / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)


def test_every_part_runs_with_what_such_a_machine_has(python: Path, tmp_path: Path) -> None:
    parts = script().PARTS
    chosen = [word for number in range(1, len(parts) + 1) for word in ("--part", str(number))]
    done = run(python, "--dry-run", *chosen, "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    for name, measures in parts.items():
        found = json.loads((tmp_path / "out" / f"{name}-cpu.json").read_text())
        assert found["dry_run"] and found["versions"]["trl"] == "not installed"
        rows = {row["name"]: row for row in found["targets"]}
        targets = [target for measure in measures for target in measure.targets]
        assert [target.name for target in targets] == list(rows) and all(
            rows[target.name]["target"] == target.text for target in targets
        )
        assert all(row["value"] > 0 for row in rows.values()), rows
    tests = json.loads((tmp_path / "out" / "correct-cpu.json").read_text())["measures"]["tests"]["raw"]
    assert len(tests) > 40 and {test["outcome"] for test in tests} == {"passed", "skipped"}
    assert all("bitsandbytes" in test["why"] for test in tests if test["outcome"] == "skipped")


def test_without_a_gpu_a_part_is_refused(python: Path) -> None:
    done = run(python, "--part", "2")
    assert done.returncode == 2 and done.stderr.endswith("no CUDA device; --dry-run runs tiny shapes on the CPU\n")


def measure(gpu: Any, name: str, take: Any, minutes: float = 1) -> Any:
    return gpu.Measure(name, minutes, (gpu.Target(f"{name} over itself", at_most=1.0),), take)


def test_a_part_goes_on_with_what_is_missing_or_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = script()
    calls: list[str] = []

    def works(given: Any) -> Any:
        calls.append("works")
        return {"works over itself": {"lower": 0.9, "median": 1.0, "upper": 1.1}, "raw": [1]}

    def breaks(given: Any) -> Any:
        calls.append("breaks")
        if calls.count("breaks") == 1:
            raise RuntimeError("out of memory")
        return {"breaks over itself": 1.5}

    monkeypatch.setattr(gpu, "PARTS", {"one": (measure(gpu, "breaks", breaks), measure(gpu, "works", works))})
    assert not gpu.run_part("one", gpu.DRY, tmp_path, False)
    found = json.loads((tmp_path / "one-cpu.json").read_text())
    assert found["measures"]["breaks"] == {"failed": "RuntimeError: out of memory"}
    assert [row["name"] for row in found["targets"]] == ["works over itself"]
    assert gpu.run_part("one", gpu.DRY, tmp_path, False) and calls == ["breaks", "works", "breaks"]
    rows = {row["name"]: row for row in json.loads((tmp_path / "one-cpu.json").read_text())["targets"]}
    assert rows["works over itself"] == {
        "name": "works over itself", "value": 1.0, "quartiles": [0.9, 1.1], "target": "at most 1.00", "met": None,
    }  # fmt: skip
    assert [gpu.Target("x", *limits).row(1.5, False)["met"] for limits in ((), (1.5,), (1.4,), (None, 1.6))] == [
        None, True, False, False,
    ]  # fmt: skip
    assert gpu.run_part("one", gpu.DRY, tmp_path, True) and len(calls) == 5


def test_no_measure_begins_that_would_outlast_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = script()
    clock = iter(range(0, 10**6, 200))  # seconds: 200 at each look
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    long = [
        measure(gpu, name, lambda _, name=name: {f"{name} over itself": 1}, minutes=5) for name in ("first", "second")
    ]
    monkeypatch.setattr(gpu, "PARTS", {"one": tuple(long)})
    assert not gpu.run_part("one", gpu.DRY, tmp_path, False)
    assert list(json.loads((tmp_path / "one-cpu.json").read_text())["measures"]) == ["first"]


def test_a_file_in_pieces_is_joined_in_order(tmp_path: Path) -> None:
    for name, text in (("part-ab", b"second"), ("part-aa", b"first ")):
        (tmp_path / name).write_bytes(text)
    importlib.import_module("gpu_measures").join(sorted(tmp_path.glob("part-*")), tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == b"first second"
