"""`mote chat`: the printed steps of a self-checked answer, and changing the mode."""

import io
import sys
from pathlib import Path

import pytest
from support.adapters import save_random_adapter
from support.checked import EXPERTS, QUESTIONS

import mote
from mote.cli.chat import talk
from mote.core.recipe import AnswerSettings
from mote.core.scheme import CHECKED


@pytest.mark.parametrize("show_steps", [True, False])
def test_checks_are_shown_before_the_accepted_answer(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, show_steps: bool
) -> None:
    model = mote.load(str(tiny), save_random_adapter(tiny, tmp_path, experts=EXPERTS), device="cpu")
    settings = AnswerSettings(max_step_tokens=6, check_threshold=1.0)
    answer = model.answer(QUESTIONS[0], CHECKED, max_step_tokens=6, check_threshold=1.0)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/mode deep\n/mode {CHECKED}\n{QUESTIONS[0]}\n/quit\n"))
    talk(model, "adaptive", settings, 0, show_steps)
    out, err = capsys.readouterr()
    assert "'deep' is not a mode" in err and CHECKED in err
    told = [line for line in out.splitlines() if line.startswith("check> ")]
    assert told == show_steps * [
        f"check> harmful ({answer.checks[0].score:.2f})", "check> retry with analysis",
        f"check> harmful ({answer.checks[1].score:.2f})", "check> retry with full",
        f"check> harmful ({answer.checks[2].score:.2f})",
    ]  # fmt: skip
    assert out.rfind("check> ") < out.index("response> ")
    assert out.count("response> ") == 1 and answer.answer in out[out.index("response> ") :]
    assert out.endswith(f"({answer.tokens.total} tokens)\n(unsafe according to its own check)\n")
