"""Memory of `mote chains` over 100,000 questions, with a fake server that answers immediately.

    .venv/bin/python benchmarks/memory.py        # about half an hour on one core; writes benchmarks/memory.json

The command runs in a separate process against `tests/support/fake_server.py` in another one. Its resident memory is
read from /proc at given numbers of finished chains. A leak per chain would show as growth between them; before the
first one the memory is Python, the libraries and the question ids.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from server import FAKE, process

from mote.core.files import write_json
from mote.core.machine import environment
from mote.core.words import words_of
from mote.questions.load import load_questions

SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)  # of the questions, at which memory is read
LOOK = 0.2  # seconds between looks
SETTINGS = {"chains.batch_size": 256, "chains.check": "rule", "chains.retries": 0}  # which passes what is benign


def main() -> None:
    """Make the chains, watch the process, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args()
    marks = [round(share * given.questions) for share in SHARES]
    with tempfile.TemporaryDirectory() as folder, process([sys.executable, str(FAKE)], "/v1/models") as address:
        run = Path(folder) / "run"
        questions = Path(folder) / "questions.jsonl"
        write_questions(questions, given.questions)
        command = [sys.executable, "-m", "mote.cli", "chains", "--engine", address, "--model", "some-model"]
        command += ["--questions", str(questions), "--out", str(run)]
        command += [f"{key}={value}" for key, value in SETTINGS.items()]
        with open(Path(folder) / "log", "wb") as log:
            running = subprocess.Popen(command, stdout=log, stderr=log)
            resident = watched(running, run / "chains.jsonl", marks)
        if running.wait() or len(resident) < len(marks):
            sys.exit((Path(folder) / "log").read_text()[-2000:])
    growth = resident[marks[-1]] / resident[marks[0]] - 1
    result: dict[str, Any] = {
        "what": "resident memory of mote chains, MB, when so many chains are finished",
        "shape": {"questions": given.questions, "engine": "a server that answers at once", **SETTINGS},
        "resident_mb": {str(mark): round(mb, 1) for mark, mb in resident.items()},
        "growth_from_first_to_last_mark": round(growth, 4),
        "target": 0.05,
        "met": growth < 0.05,
        **environment(),
    }
    write_json(given.out, result)
    print(json.dumps(result["resident_mb"] | {"growth": result["growth_from_first_to_last_mark"]}, indent=2))


def write_questions(path: Path, count: int) -> None:
    """Distinct questions made of words of the package's own set, with the same lengths."""
    own = [words_of(question.text) for question in load_questions("mote:train", None)]
    words = sorted({word for text in own for word in text})
    draw = random.Random(0)
    with open(path, "w", encoding="utf-8") as sink:
        for number in range(count):
            text = " ".join(draw.choices(words, k=len(draw.choice(own))))
            sink.write(json.dumps({"id": f"q{number}", "question": f"{text} {number}?", "kind": "benign"}) + "\n")


def watched(running: "subprocess.Popen[bytes]", chains: Path, marks: list[int]) -> dict[int, float]:
    """Resident megabytes at each number of finished chains that the process reached."""
    found: dict[int, float] = {}
    finished = place = 0
    while len(found) < len(marks) and running.poll() is None:
        time.sleep(LOOK)
        if chains.exists():
            with open(chains, "rb") as file:
                file.seek(place)
                new = file.read()
            finished = finished + new.count(b"\n")
            place = place + len(new)
        if finished >= (mark := marks[len(found)]):
            found[mark] = resident_mb(running.pid)
            print(f"{mark} chains: {found[mark]:.1f} MB", flush=True)
    return found


def resident_mb(pid: int) -> float:
    """Resident memory of a process on Linux."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main()
