"""The measurements of benchmarks/gpu.py: each function takes a `Setting` and gives target -> number, and "raw".

A number is a float, or a dict of median and quartiles (`mote.experiments.bench.timing.paired`).
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
Found = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Where and how large: the shapes of Llama-3.1-8B on a GPU, tiny ones in a dry run."""

    device: str = "cuda"
    shape: str = "llama-3.1-8b"
    dtype: str = "bfloat16"
    rows: int = 8
    length: int = 2048
    rounds: int = 5
    decoding_rows: tuple[int, ...] = (1, 8, 64)
    tokens: int = 64
    questions: int = 200
    model: Path | None = None
    work: Path = Path("runs/gpu")
    dry: bool = False


DRY = Setting("cpu", "tiny", "float32", 2, 128, 1, (1, 2, 4), 4, 12, dry=True)
SIZES = ("one row", "eight rows", "64 rows")


# --- correct


def correct(given: Setting) -> Found:
    """Runs the tests marked `gpu` and collects their relative errors."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
        environment = {**os.environ, "MOTE_GPU_DEVICE": given.device}
        done = subprocess.run([*command, "tests/end_to_end/test_gpu.py"], cwd=ROOT, env=environment, check=False)
        if not report.exists():
            raise RuntimeError(f"pytest ended with {done.returncode} and wrote no report")
        tests = [outcome(case) for case in ElementTree.parse(report).iter("testcase")]
    ran = [test for test in tests if test["outcome"] != "skipped"]
    errors = [
        (found["error"], test["name"])
        for test in ran
        for found in test["errors"].values()
        if "8-bit" not in test["name"]
    ]
    largest = {
        kind: max((error for error, name in errors if ("bfloat16" in name) == (kind == "bfloat16")), default=0.0)
        for kind in ("float32", "bfloat16")
    }
    return {
        "share of the tests that pass": sum(test["outcome"] == "passed" for test in ran) / len(ran) if ran else 0.0,
        "tests that ran": len(ran),
        **{f"largest relative error, {kind}": float(f"{error:.2e}") for kind, error in largest.items()},
        "raw": tests,
    }


def outcome(case: ElementTree.Element) -> dict[str, Any]:
    """A test of a JUnit report: its name, its outcome, its seconds, the relative errors it recorded."""
    name = str(case.get("name"))
    errors = {str(p.get("name")): json.loads(str(p.get("value"))) for p in case.iter("property")}
    found: dict[str, Any] = {"name": name, "outcome": "passed", "seconds": float(case.get("time", 0)), "errors": errors}
    for kind, text in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        if (node := case.find(kind)) is not None:
            found |= {"outcome": text, "why": str(node.get("message", ""))[:500]}
    return found


# --- training


TRAINED = ("base", "lora-32", "lora-32-again", "lora-64", "mote-4x16")


def training(compiled: bool, others: tuple[str, ...]) -> Callable[[Setting], Found]:
    """A training step of each variant; checkpointed where the activations would not fit."""

    def take(given: Setting) -> Found:
        from mote.experiments.bench.timing import paired

        settings = bench_settings(given, (*TRAINED, *others), ("training",), compiled)
        rounds = measured(replace(settings, checkpointing=given.dry or rows_that_fit(given) < given.rows))
        name, found = next(iter(rounds.items()))
        how = "compiled" if compiled else "eager"
        ratios = {
            f"training step, {how}: {label}": paired(found[one], found[other])
            for label, one, other in (
                ("four experts over LoRA r=32", "mote-4x16", "lora-32"),
                ("four experts over LoRA r=64", "mote-4x16", "lora-64"),
                ("four experts over the frozen base", "mote-4x16", "base"),
                ("token-gated over four experts", "token-gated", "mote-4x16"),
                ("masked adapters over four experts", "peft-4-masks", "mote-4x16"),
                ("LoRA r=32 again (A/A)", "lora-32-again", "lora-32"),
            )
            if one in found and other in found
        }
        return {**ratios, "raw": {"settings": vars(settings), name: found}}

    return take


def memory(compiled: bool) -> Callable[[Setting], Found]:
    """Peak memory of training steps without checkpointing, with as many rows as fit."""

    def take(given: Setting) -> Found:
        from mote.experiments.bench.compare_experts import compiled_parts
        from mote.experiments.bench.expert_settings import load_shape
        from mote.experiments.bench.measurements import make_batch, peak_mb_on_gpu
        from mote.experiments.bench.variants import build, share

        rows = min(given.rows, rows_that_fit(given))
        base = load_shape(given.shape, given.device, given.dtype)
        batch = make_batch(rows, given.length, base.config.vocab_size, given.device)
        peaks = {}
        for name in TRAINED:
            variant = build(name, share(base, name))
            with compiled_parts([variant], compiled, whole=False):
                peaks[name] = peak_mb_on_gpu(variant, batch)
            del variant
        how = "compiled" if compiled else "eager"
        return {
            f"peak memory, {how}: four experts over LoRA r=32": round(peaks["mote-4x16"] / peaks["lora-32"], 4),
            "raw": {"rows": rows, "length": given.length, "MB": peaks},
        }

    return take


def rows_that_fit(given: Setting) -> int:
    """Rows of a training step that fit into the card without checkpointing, by what a short step saves."""
    import torch

    from mote.experiments.bench.expert_settings import load_shape
    from mote.experiments.bench.measurements import TrainingStep, make_batch, saved_mb
    from mote.experiments.bench.variants import build
    from mote.models.memory_estimate import device_memory

    base = load_shape(given.shape, given.device, given.dtype)
    short = make_batch(1, min(256, given.length), base.config.vocab_size, given.device)
    weights = sum(tensor.nbytes for tensor in base.parameters())
    saved = saved_mb(TrainingStep(build("lora-64", base), short)) * 2**20 / short.ids.numel()
    logits = 3 * 4 * base.config.vocab_size  # float32 logits, their softmax and gradient, beside what is saved
    del base
    gc.collect()
    if given.device == "cuda":
        torch.cuda.empty_cache()
    room = 0.9 * device_memory(given.device) - weights
    return max(1, int(room / (given.length * (1.1 * saved + logits))))


# --- attention and step skipping


def skipping(given: Setting) -> Found:
    """One pass with skipped steps against the seven data sets: FLOPs and time."""
    from mote.experiments.bench.training import FLOPS, MASKED, SEVEN, TIME

    measures = passes(given, "skipping")
    return {
        "FLOPs: one pass over the seven data sets": ratio(measures[FLOPS], MASKED, SEVEN),
        "time: one pass over the seven data sets": ratio(measures[TIME], MASKED, SEVEN),
        "time: one pass again (A/A)": measures[TIME]["control"]["ratio"],
        "raw": measures,
    }


def masks(given: Setting) -> Found:
    """FlexAttention with skipped steps against causal attention, in whole training steps."""
    from mote.experiments.bench.training import CAUSAL, CAUSAL_AGAIN, MASKS

    measures = passes(given, "masks") | {"training step, long rows": long_rows(given)}
    return {
        f"masked over causal attention: {case}": ratio(measures[f"training step, {case}"], MASKS, CAUSAL)
        for case in ("one chain a row", "packed rows", "long rows")
    } | {
        "causal attention again (A/A): long rows": ratio(measures["training step, long rows"], CAUSAL_AGAIN, CAUSAL),
        "raw": measures,
    }


def passes(given: Setting, only: str) -> dict[str, Any]:
    """The measures of `benchmarks/training.py` with FlexAttention."""
    import torch

    from mote.experiments.bench.training import choose, measure_training

    few = {"whole": 1, "count": 4, "batch": 2, "length": 512} if given.dry else {"whole": 8}
    fixed = {"first_seed": 0, "seeds": 1, "trained_on": 1, "epochs": 1, "skip_p": 0.2, "checkpointing": False}
    settings = choose(
        None, given.shape, given.device, given.dtype, only, held_out=False, rounds=given.rounds, **fixed, **few
    )
    # Lengths and numbers of steps differ between batches: beyond the usual limit FlexAttention would run uncompiled.
    with torch._dynamo.config.patch(recompile_limit=64):
        found: dict[str, Any] = measure_training(replace(settings, flex=True))["measures"]
    return found


def long_rows(given: Setting) -> dict[str, Any]:
    """Training steps on single chains as long as a row, where causal attention is a flash kernel."""
    import torch

    from mote.experiments.bench.measurements import make_batch
    from mote.experiments.bench.skipping import Pass, batches
    from mote.experiments.bench.timing import compare, interleave
    from mote.experiments.bench.trainers import with_experts
    from mote.experiments.bench.training import CAUSAL, CAUSAL_AGAIN, MASKS
    from mote.experiments.bench.workload import prepare
    from mote.tokens.encode import Tokens
    from mote.tokens.masks import block_mask, masks_for

    workload = prepare(None, given.shape, given.device, given.dtype, None, 1)
    drawn = make_batch(2, given.length, 128, "cpu")
    chains = [
        Tokens(*rows) for rows in zip(*(part.tolist() for part in (drawn.ids, drawn.labels, drawn.steps)), strict=True)
    ]
    batch = batches(chains, 0.5, None, 2, 0, given.device)
    causal = Pass(with_experts(workload, workload.config, False), batch, None)
    masked = Pass(with_experts(workload, workload.config, True), batch, masks_for(workload.model.config, block_mask))
    for each in (causal, masked):
        each()
    seconds = interleave({CAUSAL: causal, CAUSAL_AGAIN: causal, MASKS: masked}, given.rounds)
    del workload, causal, masked
    if given.device == "cuda":
        torch.cuda.empty_cache()
    return {"variants": compare(seconds, {})}


def ratio(measure: dict[str, Any], one: str, other: str) -> dict[str, float]:
    """Median and quartiles of one variant over another."""
    from mote.experiments.bench.timing import paired

    return paired(measure["variants"][one]["rounds"], measure["variants"][other]["rounds"])


# --- decoding


def decoding(compiled: bool) -> Callable[[Setting], Found]:
    """A decoded token of each variant; compiled for one row only, since each shape compiles all blocks anew."""

    def take(given: Setting) -> Found:
        from mote.experiments.bench.timing import paired

        names = TRAINED if not compiled else tuple(name for name in TRAINED if name not in ("base", "lora-64"))
        settings = bench_settings(given, names, ("decoding",), compiled)
        counts = given.decoding_rows[:1] if compiled else given.decoding_rows
        rounds = measured(replace(settings, decoding_rows=counts))
        how = "compiled" if compiled else "eager"
        found: Found = {"raw": rounds}
        whole = [name for name in rounds if "mean" not in name and "different" not in name]
        for label, name in zip(SIZES, whole, strict=False):
            mine, lora = rounds[name]["mote-4x16"], rounds[name]["lora-32"]
            found[f"decoding, {how}: {label}, four experts over LoRA r=32"] = paired(mine, lora)
            again = paired(rounds[name]["lora-32-again"], lora)
            found[f"decoding, {how}: {label}, LoRA r=32 again (A/A)"] = again
        return found

    return take


def running_batch(given: Setting) -> Found:
    """Tokens per second of the running batch over those of `generate`, with step experts."""
    import torch
    from peft import get_peft_model

    from mote.experiments.bench.timing import interleave, paired
    from mote.experiments.bench.workload import prepare
    from mote.inference.batching import Batcher
    from mote.inference.grammar import FreeText
    from mote.inference.request import Request

    workload = prepare(None, given.shape, given.device, given.dtype, None, 1)
    model = get_peft_model(workload.model, workload.config, autocast_adapter_dtype=False).eval()  # as `mote.load` does
    length = 2 * given.tokens
    found: Found = {"raw": {}}
    most = max(given.decoding_rows)
    ids = torch.randint(1, 128, (most, length), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = workload.config.markers["response"][0]
    batcher = Batcher(model, most, workload.config.routing)

    def generated(rows: int) -> float:
        began = time.perf_counter()
        there = ids[:rows].to(given.device)
        model.generate(
            input_ids=there, attention_mask=torch.ones_like(there), max_new_tokens=given.tokens,
            min_new_tokens=given.tokens, do_sample=False, pad_token_id=0,
        )[0, -1].item()  # fmt: skip
        return rows * given.tokens / (time.perf_counter() - began)

    def batched(rows: int) -> float:
        began = time.perf_counter()
        futures = [batcher.submit(Request(row, FreeText(()), given.tokens)) for row in ids[:rows].tolist()]
        for future in futures:
            future.result()
        batcher.wait()
        return rows * given.tokens / (time.perf_counter() - began)

    for label, rows in zip(SIZES, given.decoding_rows, strict=True):
        actions = {"generate": lambda rows=rows: generated(rows), "running batch": lambda rows=rows: batched(rows)}
        for action in actions.values():
            action()
        speeds = interleave(actions, max(2, given.rounds - 2))
        found[f"running batch over generate, tokens per second: {label}"] = paired(
            speeds["running batch"], speeds["generate"]
        )
        found["raw"][label] = speeds
    return found


def bench_settings(given: Setting, variants: tuple[str, ...], measures: tuple[str, ...], compiled: bool) -> Any:
    """Settings of `mote bench experts`."""
    from mote.experiments.bench.expert_settings import choose_settings

    settings = choose_settings(
        None, given.shape, given.device, given.dtype, given.rows, given.length, given.rounds, compiled,
        only=",".join(variants), measures=",".join(measures),
    )  # fmt: skip
    return replace(settings, eager=not compiled)


def measured(settings: Any) -> dict[str, dict[str, list[float]]]:
    """Rounds of each variant in each measure of `mote bench experts`."""
    from mote.experiments.bench.compare_experts import compare_variants

    result = compare_variants(settings)
    return {
        name: {variant: row["rounds"] for variant, row in measure["variants"].items()}
        for name, measure in result["measures"].items()
    }


# --- a real model


def self_alignment(given: Setting) -> Found:
    """Questions -> chains -> adapters of `mote` and `lora-x2` -> answers -> report, of the 0.5B model."""
    from mote.core.recipe_file import load_recipe
    from mote.core.records import ChainRow, iter_rows
    from mote.experiments.run import Run

    if given.model is None and not given.dry:
        raise RuntimeError("give --model: a model folder, a GGUF file, or a folder with its pieces")
    model = model_folder(given.model or tiny_model(given.work / "tiny"), given.work)
    settings = [
        f"model={model}", "engine=transformers", f"limit={given.questions}", "chains.batch_size=64", "eval=false",
        f"answer.limit={min(32, given.questions)}", "answer.modes=[direct,full,adaptive]", f"device={given.device}",
        "train.learning_rate=2e-4", "train.marker_learning_rate=5e-3", "train.per_device_train_batch_size=8",
    ]  # fmt: skip
    if given.dry:
        settings += ["chains.check=rule", "chains.reject=[]", "chains.examples=0", "chains.max_tokens=8"]
        settings += ["answer.max_step_tokens=8", "train.held_out=0.4"]
    seconds: dict[str, float] = {}

    def timed(name: str, stage: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = stage()
        seconds[name] = round(time.perf_counter() - began, 1)
        return result

    def run(method: str) -> Run:
        return Run(load_recipe(ROOT / "recipes" / "self-align-0.5b.yaml", [*settings, f"train.method={method}"]),
                   given.work / method)  # fmt: skip

    mote, lora = run("mote"), run("lora-x2")
    chains = mote.folder / "chains.jsonl"
    mote.claim()
    timed("chains", mote.chains)
    losses = {}
    for one in (mote, lora):
        method = one.recipe.train.method
        adapter = timed(f"train, {method}", lambda one=one: one.train(chains))
        timed(f"answer, {method}", lambda one=one, adapter=adapter: one.answer(adapter))
        rows = [json.loads(line) for line in (one.folder / "metrics.jsonl").read_text().splitlines()]
        losses[method] = [row["eval_loss"] for row in rows if "eval_loss" in row]
    mote.report()
    made = list(iter_rows(chains, ChainRow))
    return {
        "0.5B model: questions": len(made),
        "0.5B model: accepted chains": sum(row.accepted for row in made),
        "0.5B model: generated tokens per second, chains": round(
            sum(row.tokens.made for row in made) / max(seconds["chains"], 0.1), 1
        ),
        **{f"0.5B model: held-out loss, {method}": round(rows[-1], 4) for method, rows in losses.items() if rows},
        "raw": {"seconds": seconds, "held-out losses": losses},
    }


def tiny_model(folder: Path) -> Path:
    """The random model of the tests, for a dry run."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.tiny import make_tiny_model

    return make_tiny_model(folder)


def model_folder(given: Path, work: Path) -> Path:
    """A model folder made of what was given: itself, a GGUF file, or a folder with the pieces of one in order."""
    from mote.models.embedded import convert_gguf

    if (given / "config.json").is_file():
        return given.resolve()
    folder = work / "model"
    if (folder / "config.json").is_file():
        return folder.resolve()
    work.mkdir(parents=True, exist_ok=True)
    gguf = given
    if given.is_dir():
        gguf = work / "joined" / "model.gguf"
        gguf.parent.mkdir(exist_ok=True)
        join(sorted(path for path in given.iterdir() if path.is_file()), gguf)
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        convert_gguf(gguf.resolve(), Path(scratch) / "ready").rename(folder)
    return folder.resolve()


def join(pieces: list[Path], whole: Path) -> None:
    """Join the pieces of a file, as `split` made them."""
    with open(whole, "wb") as sink:
        for piece in pieces:
            sink.write(piece.read_bytes())


# --- a dry run


def stand_in() -> None:
    """Let the CPU stand in for a GPU in a dry run: its memory counters, compiled FlexAttention, the compiler."""
    import torch
    from torch.nn.attention import flex_attention as flex
    from transformers.integrations.flex_attention import WrappedFlexAttention

    from mote.experiments.bench import compare_experts

    torch.cuda.empty_cache = torch.cuda.reset_peak_memory_stats = lambda: None
    torch.cuda.max_memory_allocated = lambda: 2**20
    flex._validate_device = lambda *_: None  # PyTorch refuses gradients on a CPU, though its plain form has them
    WrappedFlexAttention.__call__ = lambda _: flex.flex_attention
    compare_experts.BACKEND = "eager"
