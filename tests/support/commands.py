"""Commands that must fail with one line."""

import re
from collections.abc import Callable

import pytest

from mote import cli

PROGRESS = re.compile(r"(chains|train|answer|report): |\[transformers\] ")
Fails = Callable[..., str]


def one_error(printed: str) -> str:
    """The text of the one line that is no progress; behind a ^C, click begins a new line."""
    lines = [line for line in printed.splitlines() if line and not PROGRESS.match(line)]
    assert len(lines) == 1 and lines[0].startswith("mote: error: "), printed
    return lines[0].removeprefix("mote: error: ")


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fails:
    """Run a command in this process; it must fail with this code. Gives its message."""

    def run(*arguments: object, code: int = 2) -> str:
        monkeypatch.setattr("sys.argv", ["mote", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert ended.value.code == code and not out, (out, err)
        return one_error(err)

    return run
