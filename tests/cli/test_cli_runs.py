"""Run folders, full disks, interrupts: one line, an exit code, and a resumable state."""

import errno
import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from support import processes
from support.cli_runs import SMALL, assert_finishes, command, fails_in_process, files
from support.commands import Fails, one_error
from support.paths import ROOT

from mote import cli
from mote.core.records import ChainRow, folder_lock, read_rows

# --- chains files and run folders


def test_folder_with_another_recipe(fails: Fails, recipe: Path, done: Path) -> None:
    before = {name: (done / name).read_bytes() for name in files(done)}
    message = fails(*command(recipe, done, "seed=4", "train.learning_rate=1e-3", "train.weight_decay=0.1"))
    assert message == (
        f"out: {done} holds the run of another recipe (it differs in seed, train.learning_rate, train.weight_decay); "
        "give another folder with --out, or remove that one"
    )
    assert {name: (done / name).read_bytes() for name in files(done)} == before


def test_a_mistyped_setting_is_no_other_recipe(fails: Fails, recipe: Path, done: Path) -> None:
    message = fails(*command(recipe, done, "train.num_train_epoch=2"))
    assert message == "recipe: unknown setting 'train.num_train_epoch'; did you mean 'train.num_train_epochs'?"


def test_missing_chains(fails: Fails, tmp_path: Path) -> None:
    out = tmp_path / "out"
    message = fails("train", "--out", out)
    assert (
        message == f"chains: {out}/chains.jsonl does not exist; make it with `mote chains --out {out}` or give --chains"
    )
    assert fails("train", "--chains", tmp_path / "no.jsonl", "--out", out).startswith(
        f"chains: {tmp_path}/no.jsonl does"
    )
    assert not out.exists()


def test_chains_file_without_chains(fails: Fails, tmp_path: Path, done: Path) -> None:
    out = tmp_path / "out"
    message = fails("train", "--chains", done / "questions.jsonl", "--out", out)
    assert message.startswith(f"{done}/questions.jsonl line 1: not a ChainRow row (steps: ") and "remove" in message
    assert fails("train", "--chains", tmp_path, "--out", out).startswith(f"{tmp_path} is a folder; give")
    (tmp_path / "empty.jsonl").write_text("")
    message = fails("train", "--chains", tmp_path / "empty.jsonl", "--out", out)
    assert message == f"chains: {tmp_path}/empty.jsonl holds no chains; make some with `mote chains`"
    assert not out.exists()


def test_damaged_line_in_a_run_folder(fails: Fails, tmp_path: Path, done: Path) -> None:
    good, *rest = (done / "chains.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "chains.jsonl").write_bytes(good + b"\x00\xff not a row\n" + b"".join(rest))
    message = fails("train", "--out", tmp_path)
    assert message.startswith(f"{tmp_path}/chains.jsonl line 2: not a ChainRow row") and "remove the line" in message


def test_no_usable_chain_to_train_on(tmp_path: Path, recipe: Path, done: Path) -> None:
    rows = [row.model_copy(update={"safe": False}) for row in read_rows(done / "chains.jsonl", ChainRow)]
    path = tmp_path / "unsafe.jsonl"
    path.write_text("".join(row.model_dump_json() + "\n" for row in rows))
    out = tmp_path / "out"
    message = fails_in_process(tmp_path, "train", *SMALL, "--recipe", recipe, "--chains", path, "--out", out, code=2)
    assert message.startswith("chains: none of the 8 chains can be trained on") and "chains.threshold" in message
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["chains"],
        ["train"],
        ["answer"],
        ["run", "recipe.yaml"],
        ["ablations", str(ROOT / "recipes" / "paper" / "figure5.yaml")],
        ["eval"],
        ["export", "--adapter", "a", "--format", "merged"],
        ["chains", "export", "runs"],
        ["chains", "import", "answers.jsonl"],
        ["eval", "agreement", "--judge", "rule", "--labels", "labels.csv"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
@pytest.mark.parametrize("name", ["chains.jsonl", "Out.JSON", "answers.jsonl.gz"])
def test_out_folder_named_like_a_file_is_refused(
    fails: Fails, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(recipe.read_text())
    before = files(tmp_path)
    message = fails(*arguments, "--out", name)
    assert message.startswith(f"out: {name} is named like a file, but --out is ")
    assert message.endswith(f"give --out {name.partition('.')[0]}") and files(tmp_path) == before


def test_out_file_named_like_another_kind_is_refused(fails: Fails, done: Path, tmp_path: Path) -> None:
    chains = done / "chains.jsonl"
    before = chains.read_bytes()
    for command_ in (["chains", "view", chains], ["report", done, done]):
        message = fails(*command_, "--out", chains)
        assert message == f"out: {chains} must be a .html file; give --out {done / 'chains.html'}"
    message = fails("chains", "stats", chains, "--plot", chains)
    assert message == f"plot: {chains} must be a .svg file; give --plot {done / 'chains.svg'}"
    assert "must be a .json file" in fails("bench", "experts", "--shape", "tiny", "--out", tmp_path)
    assert chains.read_bytes() == before


@pytest.mark.parametrize("stage", ["chains", "train", "answer"])
def test_out_is_required(fails: Fails, stage: str) -> None:
    assert fails(stage) == "out: give the run folder with --out"


def test_out_that_is_a_file(fails: Fails, tmp_path: Path, recipe: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    message = fails("run", recipe, "--out", path)
    assert message == f"out: {path} cannot be used (File exists); give another folder with --out"
    assert path.read_text() == "mine"


def test_second_process_is_locked_out(fails: Fails, tmp_path: Path, recipe: Path) -> None:
    for arguments in (["run", recipe], ["chains"], ["answer"]):
        with folder_lock(tmp_path):
            message = fails(*arguments, "--out", tmp_path)
        assert message == f"out: {tmp_path} is in use by another mote process; wait for it or use --out"
    assert files(tmp_path) == [".lock"]


def test_report_on_a_missing_folder(fails: Fails, tmp_path: Path) -> None:
    assert fails("report", tmp_path / "no") == (
        f"report: {tmp_path}/no is not a run folder; give the folder that `mote run` wrote"
    )
    assert fails("report", tmp_path, "--out", "x.html").startswith("out: a single report is written to its run folder")
    assert fails("report", tmp_path, tmp_path, "--out", "x.json").startswith("out: x.json must be a .html file; give")
    assert fails("report", tmp_path, tmp_path).startswith(f"report: {tmp_path} holds no part of a run")
    assert fails("report", tmp_path).startswith(f"report: {tmp_path} holds no part of a run; make one with `mote run")
    assert not files(tmp_path)


# --- failures while running


def fill_disk(name: str, after: int) -> None:
    """From now on, writes to this file fail with ENOSPC after the first `after`."""
    from mote.core import files, records
    from mote.train import log as metrics

    written = 0

    def opened(path: Path, mode: str = "r", **more: int) -> object:
        nonlocal written
        if Path(path).name == name and mode[0] in "aw":
            written += 1
            path = path if written <= after else Path("/dev/full")
        return open(path, mode, **more)  # type: ignore[call-overload]

    files.open = records.open = metrics.open = opened  # type: ignore[attr-defined]


def limit_files(size: int) -> None:
    """Limit the file size, so that a write stops in the middle as on a full disk."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux")


@needs_full
@pytest.mark.parametrize(
    ("name", "after", "kept"),
    [
        ("chains.jsonl", 2, {"chains.jsonl": 2}),
        ("mote-direct.jsonl", 1, {"answers/mote-base.jsonl": 3, "answers/mote-direct.jsonl": 1}),
        ("metrics.jsonl", 3, {"metrics.jsonl": 4}),
        (".questions.jsonl.tmp", 0, {}),
        (".report.json.tmp", 0, {"answers/mote-adaptive.jsonl": 3}),
    ],
)
def test_full_disk(tmp_path: Path, recipe: Path, name: str, after: int, kept: dict[str, int]) -> None:
    out = tmp_path / "out"
    full = functools.partial(fill_disk, name, after)
    message = fails_in_process(tmp_path, *command(recipe, out), code=1, prepare=full)
    assert os.strerror(errno.ENOSPC) in message and "free space" in message and "run" in message
    assert name.removeprefix(".").removesuffix(".tmp") in message or message.startswith(f"train: {out}")
    before = {}
    for path, rows in kept.items():
        before[path] = (out / path).read_bytes().splitlines()
        assert len(before[path]) == rows and all(json.loads(line) for line in before[path])
    assert not list(out.rglob(".*.tmp"))
    assert_finishes(tmp_path, command(recipe, out))
    for path, lines in before.items():
        if path != "metrics.jsonl":  # training resumes from its checkpoint
            assert (out / path).read_bytes().splitlines()[: len(lines)] == lines


def test_disk_full_in_the_middle_of_a_row(tmp_path: Path, recipe: Path, done: Path) -> None:
    whole = (done / "chains.jsonl").read_bytes()
    out = tmp_path / "out"
    small = functools.partial(limit_files, len(whole) - 40)
    message = fails_in_process(tmp_path, *command(recipe, out), code=1, prepare=small)
    assert message.startswith(f"{out}/chains.jsonl: cannot be written (")
    there = (out / "chains.jsonl").read_bytes()
    assert there.endswith(b"\n") and there.count(b"\n") == 7
    assert files(out) == [".lock", "chains.jsonl", "environment.json", "questions.jsonl", "recipe.yaml"]
    assert_finishes(tmp_path, command(recipe, out))
    assert (out / "chains.jsonl").read_bytes().startswith(there)


def test_disk_full_in_the_middle_of_a_checkpoint(tmp_path: Path, recipe: Path, done: Path) -> None:
    adapter = (done / "adapter" / "adapter_model.safetensors").read_bytes()
    assert len(adapter) > 2 * (done / "chains.jsonl").stat().st_size
    out = tmp_path / "out"
    small = functools.partial(limit_files, len(adapter) - 1000)
    message = fails_in_process(tmp_path, *command(recipe, out), code=1, prepare=small)
    assert message.startswith(f"train: {out} cannot be written (") and "run the same command again" in message
    assert not (out / "adapter").exists() and not list(out.glob("checkpoints/*/complete"))
    assert_finishes(tmp_path, command(recipe, out))
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


@pytest.mark.parametrize(
    ("stage", "begun"),
    [
        ("chains", lambda out: (out / "chains.jsonl").exists()),
        ("train", lambda out: (out / "checkpoints" / "checkpoint-2" / "complete").exists()),
        ("answer", lambda out: (out / "answers").exists()),
    ],
)
def test_ctrl_c(tmp_path: Path, recipe: Path, stage: str, begun: Callable[[Path], bool]) -> None:
    for attempt in range(5):  # on a busy machine the run may end before it is interrupted
        out = tmp_path / f"out{attempt}"
        log = tmp_path / f"{attempt}.log"
        with processes.stopped_when(command(recipe, out), log, lambda out=out: begun(out), signal.SIGINT) as code:
            pass
        if code == 130:
            break
        assert code in (0, None), log.read_text()
    message = one_error(log.read_text())
    assert message == "interrupted; finished rows and checkpoints are kept, the same command resumes from there"
    rows = [line for path in out.rglob("*.jsonl") for line in path.read_bytes().splitlines()]
    assert rows and all(json.loads(line) for line in rows)
    assert_finishes(tmp_path, command(recipe, out))


def test_unexpected_exception_is_one_line(fails: Fails, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(path: Path) -> None:
        raise ZeroDivisionError("division by\nzero")

    monkeypatch.setattr("mote.core.records.folder_lock", broken)
    message = fails("chains", "--out", tmp_path, code=1)
    assert message == "ZeroDivisionError: division by (add --debug for the traceback)"


@pytest.mark.parametrize("place", [0, 1, 2])
def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: int
) -> None:
    arguments = ["run", "no.yaml"]
    arguments.insert(place, "--debug")
    monkeypatch.setattr("sys.argv", ["mote", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    *trace, line = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert "Traceback (most recent call last):" in trace and any("in load_recipe" in row for row in trace)
    assert line.startswith("mote: error: recipe: no.yaml does not exist")
