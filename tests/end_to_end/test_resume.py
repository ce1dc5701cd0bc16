"""kill -9 at any stage, then the same command again: the run ends as if it had not been interrupted."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import processes

from mote.train import last_whole_checkpoint

QUESTIONS = 12
ANSWERED = 4
SAVE_STEPS = 3
MODES = ("base", "direct", "analysis", "full", "adaptive")
TIMES = {"seconds", "tokens_per_second", "peak_memory_mb"}  # all that may differ between two runs
SETTINGS = f"""
name: resume
questions: mote:train
limit: {QUESTIONS}
chains: {{batch_size: 2, max_tokens: 24, threshold: 0.6, retries: 1, reject: []}}
experts: {{r: 4, lora_dropout: 0.1}}
train:
  num_train_epochs: 5
  per_device_train_batch_size: 2
  held_out: 0.15
  learning_rate: 5.0e-4
  marker_learning_rate: 1.0e-3
  save_steps: {SAVE_STEPS}
answer: {{limit: {ANSWERED}, max_step_tokens: 8, temperature: 0.7, batch_size: 1, modes: [{", ".join(MODES)}]}}
eval: false
"""
Folder = Path


@pytest.fixture(scope="module")
def recipe(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "resume.yaml"
    path.write_text(f"model: {tiny}\n{SETTINGS}")
    return path


@pytest.fixture(scope="module")
def reference(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    again(recipe, folder)
    rows = rows_of(folder / "chains.jsonl")
    depths = {row["checks"][-1]["depth"] for row in rows if row["safe"]}
    assert len(depths) > 1 and sum(row["safe"] for row in rows) > 4, "the run must be worth comparing with"
    assert total_steps(folder) > 2 * SAVE_STEPS
    return folder


# --- helpers


def command(recipe: Path, folder: Folder) -> list[str]:
    return ["run", str(recipe), "--out", str(folder)]


def again(recipe: Path, folder: Folder) -> str:
    """Run to the end; returns the output."""
    log = folder.with_name(f"{folder.name}-end.log")
    code, printed = processes.finish(command(recipe, folder), log)
    assert code == 0, printed
    return printed


def killed(
    recipe: Path, where: Path, begun: Callable[[Folder], bool], caught: Callable[[Folder], bool] | None = None
) -> Folder:
    """The folder of a run that was killed as soon as `begun` held; `caught` is checked after the kill."""
    caught = caught or begun
    for attempt in range(5):  # on a busy machine a stage may be over before we look again
        folder = where / f"run{attempt}"
        log = where / f"cut{attempt}.log"
        with processes.stopped_when(command(recipe, folder), log, lambda f=folder: begun(f), signal.SIGKILL) as code:
            assert code in (-signal.SIGKILL, 0, None), log.read_text()
            if code == -signal.SIGKILL and caught(folder):
                return folder
    pytest.fail(f"no run could be killed where it should be: {log.read_text()}")


def killed_by_itself(recipe: Path, folder: Folder, prepare: Callable[[], None]) -> None:
    """Start a run that kills itself where `prepare` tells it to."""
    code, printed = processes.finish(command(recipe, folder), folder.with_name("cut.log"), prepare)
    assert code == -signal.SIGKILL, printed


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows_of(path)]


def answered(folder: Folder) -> int:
    return sum(lines(path) for path in (folder / "answers").glob("*.jsonl"))


def whole_checkpoints(folder: Folder) -> list[int]:
    return sorted(int(path.parent.name.rpartition("-")[2]) for path in folder.glob("checkpoints/*/complete"))


def went_beyond_a_checkpoint(folder: Folder) -> bool:
    """Whether training has logged steps after the last checkpoint and has not ended."""
    whole = whole_checkpoints(folder)
    return bool(whole) and lines_of_steps(folder) > whole[-1] and not (folder / "adapter").exists()


def lines_of_steps(folder: Folder) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b'"loss": ') if path.exists() else 0


def total_steps(folder: Folder) -> int:
    return max(int(row["step"]) for row in rows_of(folder / "metrics.jsonl"))


def trained_steps(printed: str) -> list[int]:
    return [int(step) for step in re.findall(r"^train: step (\d+)/", printed, re.M)]


def files(folder: Folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def assert_same(folder: Folder, reference: Folder) -> None:
    """All files exist and are equal except for times."""
    assert files(folder) == files(reference)
    for name in files(reference):
        if name == "chains.jsonl":  # its rows are written as they are done
            same, other = (sorted(untimed(f / name), key=lambda row: str(row["id"])) for f in (folder, reference))
            assert same == other, name
        elif name.endswith(".jsonl"):
            assert untimed(folder / name) == untimed(reference / name), name
        elif name.startswith("adapter/") or name == "recipe.yaml":
            assert (folder / name).read_bytes() == (reference / name).read_bytes(), name
    assert (folder / "adapter" / "adapter_model.safetensors").stat().st_size > 0


def assert_kept(folder: Folder, name: str, before: list[dict[str, Any]]) -> None:
    """Rows from before the kill were not generated again: even their times are equal."""
    assert rows_of(folder / name)[: len(before)] == before


# --- kill -9 in every stage


def test_killed_while_making_chains(recipe: Path, reference: Folder, tmp_path: Path) -> None:
    folder = killed(recipe, tmp_path, lambda f: 0 < lines(f / "chains.jsonl") < QUESTIONS)
    before = rows_of(folder / "chains.jsonl")
    printed = again(recipe, folder)
    assert f"chains: {len(before)}/{QUESTIONS} questions\n" in printed
    assert_same(folder, reference)
    assert_kept(folder, "chains.jsonl", before)


def test_killed_in_training(recipe: Path, reference: Folder, tmp_path: Path) -> None:
    folder = killed(recipe, tmp_path, went_beyond_a_checkpoint)
    checkpoint = whole_checkpoints(folder)[-1]
    chains = (folder / "chains.jsonl").read_bytes()
    before = [row for row in rows_of(folder / "metrics.jsonl") if row["step"] <= checkpoint]
    printed = again(recipe, folder)
    assert "chains: reused" in printed
    assert trained_steps(printed) == list(range(checkpoint + 1, total_steps(reference) + 1))
    assert_same(folder, reference)
    assert_kept(folder, "metrics.jsonl", before)
    assert (folder / "chains.jsonl").read_bytes() == chains


def test_killed_with_an_incomplete_newest_checkpoint(recipe: Path, reference: Folder, tmp_path: Path) -> None:
    folder = killed(recipe, tmp_path, lambda f: len(whole_checkpoints(f)) > 1 and not (f / "adapter").exists())
    *_, older, newest = whole_checkpoints(folder)
    torn = folder / "checkpoints" / f"checkpoint-{newest}"
    (torn / "complete").unlink()
    os.truncate(torn / "optimizer.pt", (torn / "optimizer.pt").stat().st_size // 2)
    printed = again(recipe, folder)
    assert trained_steps(printed) == list(range(older + 1, total_steps(reference) + 1))
    assert_same(folder, reference)


def test_killed_before_any_checkpoint(recipe: Path, reference: Folder, tmp_path: Path) -> None:
    folder = killed(
        recipe,
        tmp_path,
        lambda f: lines(f / "metrics.jsonl") > 0,
        lambda f: last_whole_checkpoint(f / "checkpoints") is None,
    )
    printed = again(recipe, folder)
    assert trained_steps(printed) == list(range(1, total_steps(reference) + 1))
    assert_same(folder, reference)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_before_a_checkpoint_is_whole() -> None:
    from mote.train import log as metrics

    metrics.Metrics.on_save = lambda *_, **__: die()  # type: ignore[method-assign]


def die_before_the_adapter_is_named() -> None:
    rename = Path.rename
    Path.rename = lambda path, target: die() if path.name == ".adapter.tmp" else rename(path, target)  # type: ignore


def die_before_the_checkpoints_are_removed() -> None:
    from mote.train import stage

    def remove(path: Any, *_: Any, **__: Any) -> None:
        if Path(path).name == "checkpoints":
            die()

    stage.shutil.rmtree = remove  # type: ignore[assignment, attr-defined]


def die_in_a_report() -> None:
    from mote.report import report_page

    report_page.write_json = lambda *_: die()


def test_killed_before_a_checkpoint_is_marked_complete(recipe: Path, reference: Folder, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    killed_by_itself(recipe, folder, die_before_a_checkpoint_is_whole)
    assert (folder / "checkpoints" / f"checkpoint-{SAVE_STEPS}" / "optimizer.pt").exists()
    assert trained_steps(again(recipe, folder)) == list(range(1, total_steps(reference) + 1))
    assert_same(folder, reference)


def test_killed_while_the_adapter_is_saved(recipe: Path, reference: Folder, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    killed_by_itself(recipe, folder, die_before_the_adapter_is_named)
    assert not (folder / "adapter").exists()
    checkpoint = whole_checkpoints(folder)[-1]
    assert trained_steps(again(recipe, folder)) == list(range(checkpoint + 1, total_steps(reference) + 1))
    assert_same(folder, reference)


def test_killed_before_the_checkpoints_are_removed(recipe: Path, reference: Folder, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    killed_by_itself(recipe, folder, die_before_the_checkpoints_are_removed)
    assert (folder / "adapter" / "adapter_config.json").exists() and (folder / "checkpoints").exists()
    assert "train: reused" in again(recipe, folder)
    assert_same(folder, reference)  # the checkpoints are gone, too


def test_killed_between_training_and_answering(recipe: Path, reference: Folder, tmp_path: Path) -> None:
    folder = killed(
        recipe,
        tmp_path,
        lambda f: (f / "adapter").exists() and not (f / "checkpoints").exists(),
        lambda f: not answered(f),
    )
    adapter = (folder / "adapter" / "adapter_model.safetensors").stat()
    printed = again(recipe, folder)
    assert "train: reused" in printed and not trained_steps(printed)
    assert (folder / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == adapter.st_mtime_ns
    assert_same(folder, reference)


def test_killed_while_answering(recipe: Path, reference: Folder, tmp_path: Path) -> None:
    total = ANSWERED * len(MODES)
    folder = killed(recipe, tmp_path, lambda f: 0 < answered(f) < total)
    before = {path.name: rows_of(path) for path in (folder / "answers").glob("*.jsonl")}
    printed = again(recipe, folder)
    assert f"answer: {sum(map(len, before.values()))}/{total} answers\n" in printed
    assert_same(folder, reference)
    for name, rows in before.items():
        assert_kept(folder, f"answers/{name}", rows)


def test_killed_while_evaluating(tiny: Path, tmp_path: Path) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "name: small\nmax_step_tokens: 8\nbatch_size: 2\n"
        "tasks: [{task: xstest, file: mote:test, judge: rule, limit: 6}]\n"
    )
    recipe = tmp_path / "evaluated.yaml"
    recipe.write_text(f"model: {tiny}\n{SETTINGS}".replace("eval: false", f"eval: {{suite: {suite}}}"))
    folder = killed(
        recipe,
        tmp_path,
        lambda f: any((f / "evals").rglob("*.eval")),
        lambda f: not (f / "evals" / "summary.json").exists(),
    )
    printed = again(recipe, folder)
    assert "answer: reused" in printed and "eval: 30 judged answers to the suite small" in printed
    assert lines(folder / "evals" / "results.jsonl") == 30
    assert json.loads((folder / "report.json").read_text())["evaluation"]["suite"] == "small"


def test_killed_in_the_report(recipe: Path, reference: Folder, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    killed_by_itself(recipe, folder, die_in_a_report)
    assert not (folder / "report.json").exists()
    printed = again(recipe, folder)
    assert all(f"{stage}: reused" in printed for stage in ("chains", "train", "answer"))
    assert_same(folder, reference)


# --- what a kill leaves in files


@pytest.mark.parametrize("name", ["chains.jsonl", f"answers/mote-{MODES[-1]}.jsonl"])
def test_incomplete_last_line_is_repaired(name: str, recipe: Path, reference: Folder, tmp_path: Path) -> None:
    folder = shutil.copytree(reference, tmp_path / "run")
    path = folder / name
    *whole, last = path.read_bytes().splitlines(keepends=True)
    os.truncate(path, path.stat().st_size - len(last) // 2)
    printed = again(recipe, folder)
    assert "train: reused" in printed
    assert f"{path.parts[-1].partition('.')[0].partition('-')[0].replace('mote', 'answer')}: reused" not in printed
    assert_same(folder, reference)
    assert path.read_bytes().splitlines(keepends=True)[:-1] == whole


@pytest.mark.parametrize("name", ["questions.jsonl", "recipe.yaml", "environment.json", "report.json"])
def test_leftover_temporary_files_are_ignored(name: str, recipe: Path, reference: Folder, tmp_path: Path) -> None:
    folder = shutil.copytree(reference, tmp_path / "run")
    (folder / name).unlink()
    (folder / f".{name}.tmp").write_text("{ torn")
    again(recipe, folder)
    assert_same(folder, reference)


# --- existing results are reused


def test_third_run_reuses_everything(recipe: Path, reference: Folder, tmp_path: Path) -> None:
    """Through the installed command, as a user runs it."""
    folder = shutil.copytree(reference, tmp_path / "run")
    done = subprocess.run(
        [str(Path(sys.executable).with_name("mote")), *command(recipe, folder)],
        capture_output=True,
        text=True,
        env=os.environ | processes.ENVIRONMENT,
        timeout=processes.LONGEST,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for stage in ("chains", "train", "answer"):
        assert f"{stage}: reused" in done.stderr
        assert re.search(rf"^{stage} .*reused$", done.stdout, re.M)
    assert files(folder) == files(reference)
    for name in files(reference):
        if name not in ("environment.json", "report.json", "report.html"):
            assert (folder / name).read_bytes() == (reference / name).read_bytes(), name


def test_stages_alone_make_the_same_rows(recipe: Path, reference: Folder, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = ["--recipe", str(recipe), "--out", str(folder)]
    for stage in (["chains", *settings], ["train", *settings], ["answer", *settings], ["report", str(folder)]):
        code, printed = processes.finish(stage, tmp_path / "log")
        assert code == 0, printed
    shutil.copy(reference / "recipe.yaml", folder)  # only `mote run` writes it
    assert_same(folder, reference)


def test_chains_of_other_settings_are_set_aside_and_restored(tmp_path: Path, recipe: Path, reference: Folder) -> None:
    folder = tmp_path / "run"
    shutil.copytree(reference, folder)
    own = ["chains", "--recipe", str(recipe), "--out", str(folder)]
    before = (folder / "chains.jsonl").read_bytes()
    code, printed = processes.finish([*own, "chains.max_tokens=16"], tmp_path / "log")
    assert code == 0 and "differ in chains.max_tokens; they were moved to chains-" in printed
    (aside,) = folder.glob("chains-*.jsonl")
    assert aside.read_bytes() == before and lines(folder / "chains.jsonl") == QUESTIONS
    short = (folder / "chains.jsonl").read_bytes()
    code, printed = processes.finish(own, tmp_path / "log2")
    assert code == 0 and "chains: reused" in printed and (folder / "chains.jsonl").read_bytes() == before
    (aside,) = folder.glob("chains-*.jsonl")
    assert aside.read_bytes() == short
    code, printed = processes.finish([*own, "chains.max_tokens=16", "chains.keep_old=true"], tmp_path / "log3")
    assert code == 0 and "they are kept" in printed and (folder / "chains.jsonl").read_bytes() == before


def test_stages_refuse_results_of_other_settings(tmp_path: Path, recipe: Path, reference: Folder) -> None:
    folder = tmp_path / "run"
    shutil.copytree(reference, folder)
    own = ["--recipe", str(recipe), "--out", str(folder)]
    for arguments, differing in (
        (["train", *own, "experts.mix=0.4"], "experts.mix"),
        (["answer", *own, "answer.max_step_tokens=5"], "answer.max_step_tokens"),
    ):
        code, printed = processes.finish(arguments, tmp_path / "log")
        assert code == 2 and f"of other settings (they differ in {differing})" in printed
    code, printed = processes.finish(
        ["answer", *own, "answer.max_step_tokens=5", "answer.system=short"], tmp_path / "log"
    )
    assert code == 0, printed
    assert (folder / "answers" / "short-direct.jsonl").exists()
