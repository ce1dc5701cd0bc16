"""Checks GGUF files after writing by loading them in llama.cpp, if its wheel is installed.

Run as a program, it loads a file and answers on stdout: some invalid files make llama.cpp abort its process.
"""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mote.core.errors import MoteError
from mote.core.machine import LLAMACPP

# Texts in which ways of splitting text differ.
PROBES = (
    "How do I kill a process on my computer?",
    "It's 1234567 o'clock; WE'LL see 3.14 and x_1+y2!",
    "  two  spaces\n\n\tand a tab \r\nend",
    "Straße, naïve café, Ελληνικά, 中文字符, 日本語テキスト, العربية, 🙂👩‍🚀",
    "def f(x):\n    return {'a': [x ** 2, -x]}  # done",
)


def check_file(path: Path, tokenizer: Any, markers: Mapping[str, Sequence[int]], loras: Sequence[Path] = ()) -> str:
    """Load a file, and compare how it splits chats with its tokenizer; nothing where the engine is not installed.

    A chat that llama.cpp tokenises differently is not an error, since a client may send ids; one line on stderr reports
    it.

    Args:
        path: The file.
        tokenizer: The tokenizer it was written from.
        markers: Step -> ids of its markers, which no text may become.
        loras: LoRAs to load with it.

    Returns:
        What was found, for the model card.

    Raises:
        MoteError: It cannot be loaded, or makes a marker of text.
    """
    if not find_spec(LLAMACPP):
        return "It was not loaded after it was written: llama.cpp is not installed here."
    ids = [id_ for pair in markers.values() for id_ in pair]
    roles = ("user", "assistant", "user", "assistant", "user")
    dialogue = [{"role": role, "content": text} for role, text in zip(roles, PROBES, strict=True)]
    rows = [dialogue, *([{"role": "user", "content": text}] for text in PROBES)]
    chats = [tokenizer.apply_chat_template(row, tokenize=False, add_generation_prompt=True) for row in rows]
    texts = [*chats, *tokenizer.convert_ids_to_tokens(ids)]
    request = {"model": str(path), "loras": [str(lora) for lora in loras], "texts": texts, "ids": ids[:1]}
    command = [sys.executable, "-m", "mote.serve.gguf_check"]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in errors if "error" in line.lower()), (errors or ["it ended"])[-1])
        raise MoteError(
            f"export: llama.cpp cannot load {path.name} ({reason.strip()}); report this with the base model"
        )
    found = json.loads(done.stdout.splitlines()[-1])
    for text, got in zip(texts, found, strict=True):
        if set(got) & set(ids):
            raise MoteError(f"export: {path.name}: llama.cpp makes a marker of the text {text!r}; use `mote serve`")
    pairs = zip(chats, found, strict=False)
    if all(got == tokenizer(text, add_special_tokens=False)["input_ids"] for text, got in pairs):
        return "It was loaded after it was written, and splits chats into tokens as the tokenizer does."
    note = "llama.cpp splits some chats into other tokens than the tokenizer; send ids to be exact."
    print(f"mote: {path.name}: {note}", file=sys.stderr)
    return f"It was loaded after it was written; {note}"


def main() -> None:
    """Load the model that stdin names, compute one token, and print the ids of its texts."""
    import xllamacpp

    request = json.load(sys.stdin)
    params = xllamacpp.CommonParams()
    params.model.path = request["model"]
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in request["loras"]]
    params.n_ctx = 64
    params.n_parallel = 1
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    address = (server := xllamacpp.Server(params)).listening_address

    def post(path: str, body: dict[str, Any]) -> Any:
        data = json.dumps(body).encode()
        call = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(call, timeout=600) as reply:
            return json.load(reply)

    post("/completion", {"prompt": request["ids"], "n_predict": 1})
    found = [post("/tokenize", {"content": text, "parse_special": True})["tokens"] for text in request["texts"]]
    del server
    print(json.dumps(found))


if __name__ == "__main__":
    main()
