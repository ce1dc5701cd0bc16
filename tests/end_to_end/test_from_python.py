"""`examples/from_python.py`, run as a user runs it, on the tiny model."""

import os
import subprocess
import sys
from pathlib import Path

from support.paths import ROOT


def test_the_ten_calls_run(tiny: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "from_python.py"), str(tiny), str(tmp_path / "adapter")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert "same logits after loading: True" in done.stdout
    assert "full " in done.stdout and "trainable params" in done.stdout
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_without_arguments_it_says_how_to_call_it() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "examples" / "from_python.py")], capture_output=True, text=True)
    assert done.returncode == 1 and "usage: " in done.stderr
