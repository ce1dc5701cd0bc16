"""The command line itself: help texts, wrong command lines, the version."""

import re

import click
import pytest
from support.commands import Fails

from mote import cli
from mote.cli.options import WithCommands

# --- commands and help

OPTIONS = {
    "run": {"--out", "--dry-run"},
    "chains": {"--recipe", "--model", "--questions", "--engine", "--seed", "--limit", "--out"},
    "chains stats": {"--json", "--plot", "--price", "--sample", "--tokenizer"},
    "chains view": {"--out"},
    "chains import": {"--format", "--writer", "--limit", "--out"},
    "chains export": {"--out", "--license", "--push", "--private"},
    "train": {"--recipe", "--model", "--chains", "--engine", "--seed", "--limit", "--out"},
    "ablations": {"--out", "--judge", "--data", "--dry-run"},
    "answer": {"--recipe", "--model", "--adapter", "--questions", "--mode", "--engine", "--seed", "--limit", "--out"},
    "chat": {"--model", "--adapter", "--mode", "--engine", "--seed", "--show-steps", "--answer-only"},
    "serve": {
        "--engine",
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
    "export": {"--adapter", "--model", "--mode", "--out", "--format", "--dtype", "--quantise", "--experts"},
    "report": {"--out"},
    "eval": {
        *("--model", "--adapter", "--system", "--suite", "--modes", "--judge", "--data", "--limit", "--seed"),
        *("--device", "--dtype", "--engine", "--out"),
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
    "doctor": {"--model", "--revision", "--remove-gguf"},
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
