"""`--engine llamacpp` of every command, what `mote doctor` shows of it, and what it refuses."""

import io
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from inspect_ai import Task
from inspect_ai import eval as inspect_eval
from inspect_ai.dataset import Sample
from inspect_ai.model import get_model
from inspect_ai.solver import generate
from support.adapters import QUESTIONS, save_random_adapter
from support.cli_runs import SMALL
from support.commands import Fails
from support.paths import ROOT
from support.servers import ask, served

import mote
from mote import cli
from mote.core.machine import LLAMACPP, LLAMACPP_VERSION
from mote.core.records import Answer, ChainRow, read_rows
from mote.evals.provider import MoteAPI
from mote.inference.engines.llama_library import load_library

NEEDED = pytest.mark.skipif(
    not any(d.name == LLAMACPP for d in metadata.distributions()), reason="llama.cpp is missing"
)


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_adapter(tiny, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_library.cache_clear()
    yield
    load_library.cache_clear()


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": text}) + "\n" for text in QUESTIONS))
    return path


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["mote", *map(str, arguments)])
    cli.main()


@NEEDED
def test_answers_of_the_command_equal_the_in_process_engines(
    tiny: Path, adapter: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {}
    for engine in ("llamacpp", "transformers"):
        given = ["--mode", "full", "--mode", "base", "--engine", engine, "dtype=float32", "answer.max_step_tokens=6"]
        out = tmp_path / engine
        command(
            monkeypatch, "answer", "--model", tiny, "--adapter", adapter, "--questions", questions, "--out", out, *given
        )
        rows[engine] = [read_rows(out / "answers" / f"mote-{mode}.jsonl", Answer) for mode in ("full", "base")]
        rows[engine] = [[(row.id, row.steps, row.tokens) for row in answers] for answers in rows[engine]]
    assert rows["llamacpp"] == rows["transformers"]


@NEEDED
def test_answers_of_another_engine_are_refused_in_a_folder(
    tiny: Path, adapter: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Fails
) -> None:
    given = [
        "--model",
        tiny,
        "--adapter",
        adapter,
        "--questions",
        questions,
        "--out",
        tmp_path / "run",
        "--mode",
        "direct",
    ]
    command(monkeypatch, "answer", *given, "answer.max_step_tokens=2")
    message = fails("answer", *given, "answer.max_step_tokens=2", "--engine", "llamacpp")
    assert "other settings (they differ in" in message and "engine" in message


@NEEDED
def test_chains_of_the_command_equal_the_in_process_engines(
    tiny: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {}
    for engine in ("llamacpp", "transformers"):
        given = ["--engine", engine, "dtype=float32", "chains.max_tokens=8", "chains.examples=1", "chains.retries=0"]
        command(
            monkeypatch, "chains", "--model", tiny, "--questions", questions, "--out", tmp_path / engine, *given,
            "chains.temperature=0",
        )  # fmt: skip
        rows = sorted(read_rows(tmp_path / engine / "chains.jsonl", ChainRow), key=lambda row: row.id)
        texts[engine] = [(row.id, row.steps, row.safe, row.rejected, row.tokens) for row in rows]
    assert texts["llamacpp"] == texts["transformers"]


@NEEDED
def test_chat_prints_the_answer(
    tiny: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = mote.load(str(tiny), adapter).answer(QUESTIONS[0], "analysis", max_step_tokens=6)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTIONS[0]}\n"))
    given = ["--model", tiny, "--adapter", adapter, "--mode", "analysis", "--engine", "llamacpp"]
    command(monkeypatch, "chat", *given, "dtype=float32", "answer.max_step_tokens=6")
    out, err = capsys.readouterr()
    assert expected.answer in out and f"({expected.tokens.total} tokens)" in out and "writing f32 GGUF" in err


@NEEDED
def test_served_answers_equal_the_in_process_engines(tiny: Path, adapter: Path) -> None:
    expected = mote.load(str(tiny), adapter).answer(QUESTIONS[0], "full", max_step_tokens=6)
    model = mote.load(str(tiny), adapter, dtype="float32", engine="llamacpp")
    with served(model) as (address, _):
        reply = ask(address, QUESTIONS[0], model="tiny:full").json()
        assert reply["choices"][0]["message"]["content"] == expected.answer
        assert reply["usage"]["completion_tokens"] == expected.tokens.total
        streamed = ask(address, QUESTIONS[0], model="tiny:full", stream=True).text
        assert streamed.count('"event":"end"') == 3 and "[DONE]" in streamed
    model.batcher.close()


@NEEDED
def test_evaluated_answers_equal_the_in_process_engines(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    task = Task(dataset=[Sample(input=question) for question in QUESTIONS], solver=generate())
    given: Any = {"adapter": str(adapter), "mode": "full", "max_step_tokens": 6, "dtype": "float32"}
    model = get_model(f"mote/{tiny}", engine="llamacpp", **given)
    assert isinstance(model.api, MoteAPI)
    (log,) = inspect_eval(task, model=model, log_dir=str(tmp_path), display="none", log_level="error")
    expected = mote.load(str(tiny), adapter).answer(QUESTIONS, "full", max_step_tokens=6)
    assert [sample.output.completion for sample in log.samples or []] == [answer.answer for answer in expected]
    assert model.api.base_url != get_model(f"mote/{tiny}", **given).api.base_url  # cached answers are not mixed
    model.api.close()


@NEEDED
def test_a_run_makes_chains_and_answers_with_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(f"name: small\nmodel: {tiny}\nengine: llamacpp\n")
    few = ["limit=4", "train.num_train_epochs=1", "answer.limit=1", "answer.modes=[full,base]"]
    command(monkeypatch, "run", recipe, *SMALL, *few, "--out", tmp_path / "run")
    assert capsys.readouterr().err.count("writing q8_0 GGUF") == 2  # of the base model, then of the adapter
    assert len(read_rows(tmp_path / "run" / "answers" / "mote-full.jsonl", Answer)) == 1


@pytest.mark.parametrize("arguments", [["--engine", "llamacpp"], ["engine=llamacpp"]])
def test_training_with_it_is_refused(arguments: list[str], tmp_path: Path, fails: Fails) -> None:
    assert fails("train", "--out", tmp_path / "run", *arguments).startswith("engine: llamacpp cannot train")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["answer", "chains", "chat", "serve", "eval", "run"])
def test_without_the_extra_each_command_says_how_to_get_it(
    name: str, tiny: Path, adapter: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Fails
) -> None:
    version = metadata.version

    def look(package: str) -> str:
        if package == LLAMACPP:
            raise metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(metadata, "version", look)
    out, model = ["--out", tmp_path / "run"], ["--model", tiny, "--engine", "llamacpp"]
    recipe = tmp_path / "small.yaml"
    recipe.write_text(f"model: {tiny}\nengine: llamacpp\nquestions: {questions}\n")
    arguments: dict[str, list[object]] = {
        "answer": [*model, "--adapter", adapter, "--questions", questions, *out],
        "chains": [*model, "--questions", questions, *out],
        "chat": [*model, "--adapter", adapter],
        "serve": [*model, "--adapter", adapter, "--port", 0],
        "eval": [*model, "--adapter", adapter, *out],
        "run": [recipe, *out],
    }
    message = fails(name, *arguments[name])
    assert message.startswith("engine: llama.cpp is not installed; pip install 'mote-align[llamacpp]'")


def test_doctor_shows_and_removes_cached_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cache" / "mote" / "gguf" / "adapter-q8_0-0123"
    folder.mkdir(parents=True)
    (folder / "model.gguf").write_bytes(b"\0" * 200_000_000)
    command(monkeypatch, "doctor")
    shown = capsys.readouterr().out
    assert "adapter-q8_0-0123 (0.2 GB); `mote doctor --remove-gguf` removes them" in shown
    command(monkeypatch, "doctor", "--remove-gguf")
    assert "0.2 GB freed" in capsys.readouterr().out and not folder.exists()
    command(monkeypatch, "doctor")
    assert "gguf files" not in capsys.readouterr().out


def test_the_extra_installs_the_release_that_is_known() -> None:
    pinned = f'"{LLAMACPP}=={LLAMACPP_VERSION}"'
    assert pinned in (ROOT / "pyproject.toml").read_text()
    assert f"{LLAMACPP}=={LLAMACPP_VERSION}\n" in (ROOT / "constraints.txt").read_text()
