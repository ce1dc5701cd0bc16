"""What training costs: step skipping beside the data sets it stands for, masks, packing, and TRL beside us.

`benchmarks/training.py` says how it is measured, and on what.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mote.core.errors import UserError
from mote.core.files import write_json
from mote.core.machine import environment
from mote.experiments.bench.held_out import compare_held_out
from mote.experiments.bench.peak_memory import peak_mb_in_subprocess
from mote.experiments.bench.skipping import Pass, batches, seven, step_views
from mote.experiments.bench.timing import compare, interleave, paired, say
from mote.experiments.bench.trainers import (
    ARMS,
    PACKED,
    PADDED,
    SFT_AGAIN,
    SFT_PACKED,
    SFT_PADDED,
    TrainerSettings,
    build,
    with_experts,
)
from mote.experiments.bench.workload import Workload, facts, prepare
from mote.models.embedded import EMBEDDED
from mote.models.load import default_device, default_dtype
from mote.tokens.masks import block_mask, document_mask

MEASURES = ("memory", "skipping", "masks", "trainers", "held-out")
SEVEN, MASKED, MASKED_AGAIN = "seven data sets", "masked pass", "masked pass again"
TWO_VIEWS = "masked pass, two views"
CAUSAL, CAUSAL_AGAIN, MASKS = "causal", "causal again", "masked"
FLOPS, TIME = "FLOPs of an epoch", "time of an epoch"
SPEED, MEMORY = "training", "peak memory"
TARGETS: tuple[tuple[str, str, str, str, float, float], ...] = (  # measure, one, other, kind, limit on a CPU, on a GPU
    (FLOPS, MASKED, SEVEN, "at_most", 0.30, 0.30),
    (TIME, MASKED, SEVEN, "at_most", 0.35, 0.35),
    (FLOPS, TWO_VIEWS, SEVEN, "at_most", 0.30, 0.30),
    (TIME, TWO_VIEWS, SEVEN, "at_most", 0.35, 0.35),
    ("training step, one chain a row", MASKS, CAUSAL, "at_most", 1.15, 1.05),
    ("training step, packed rows", MASKS, CAUSAL, "at_most", 1.15, 1.05),
    (SPEED, PACKED, PADDED, "at_least", 1.5, 1.5),
    (SPEED, PADDED, SFT_PADDED, "at_least", 1.0, 1.0),
    (SPEED, PACKED, SFT_PACKED, "at_least", 1.0, 1.0),
    (MEMORY, PADDED, SFT_PADDED, "at_most", 1.02, 1.02),
    (MEMORY, PACKED, SFT_PACKED, "at_most", 1.02, 1.02),
)


@dataclass(frozen=True)
class TrainingBenchSettings:
    """Everything that decides the numbers.

    Attributes:
        model: As in a recipe, or None with a shape.
        shape: One of `mote.experiments.bench.expert_settings.SHAPES`.
        device: `cpu` or `cuda`.
        dtype: Of the base model.
        chains: A file of chains, or None for made-up rows.
        count: How many chains.
        whole: How many chains of all three steps, for step skipping and masks.
        rounds: How often each is measured.
        threads: Of PyTorch.
        training: Rows, lengths, and the chance of skipping.
        measures: Some of `MEASURES`.
        first_seed: Of the held-out comparison, as are the next three.
        seeds: How many.
        trained_on: Most chains that each arm is trained on.
        epochs: Epochs of each arm and seed.
    """

    model: str | None
    shape: str | None
    device: str
    dtype: str
    chains: str | None
    count: int
    whole: int
    rounds: int
    threads: int
    training: TrainerSettings
    measures: tuple[str, ...]
    first_seed: int
    seeds: int
    trained_on: int
    epochs: int


def choose(
    model: str | None, shape: str | None, device: str, dtype: str, only: str | None, held_out: bool, **given: Any
) -> TrainingBenchSettings:
    """TrainingBenchSettings with the device's defaults.

    Raises:
        UserError: A measure that is not known, or a model beside a shape.
    """
    import torch

    device = default_device() if device == "auto" else device
    on_gpu = device.startswith("cuda")
    if model and shape:
        raise UserError(f"shape: '{shape}' and --model '{model}' exclude each other; give one of them")
    if not model and not shape:
        model, shape = (None, "llama-3.1-8b") if on_gpu else (EMBEDDED, None)
    names = tuple(only.split(",")) if only else (MEASURES if held_out else MEASURES[:-1])
    if unknown := [name for name in names if name not in MEASURES]:
        raise UserError(f"only: '{unknown[0]}' is not known; use some of {', '.join(MEASURES)}")
    defaults = {"count": 64, "batch": 8, "length": 2048} if on_gpu else {"count": 24, "batch": 8, "length": 1024}
    chosen = {"chains": None, **defaults, **{name: value for name, value in given.items() if value is not None}}
    training = TrainerSettings(chosen.pop("batch"), chosen.pop("length"), chosen.pop("skip_p"), device,
                        chosen.pop("checkpointing"))  # fmt: skip
    return TrainingBenchSettings(
        model=model, shape=shape, device=device, dtype=default_dtype(device) if dtype == "auto" else dtype,
        threads=torch.get_num_threads(), training=training, measures=names, **chosen,
    )  # fmt: skip


def measure_training(settings: TrainingBenchSettings, out: Path | None = None) -> dict[str, Any]:
    """Measure everything, and write what is there so far after each measure.

    Raises:
        UserError: The chains cannot be read, or none has all three steps.
        MoteError: Peak memory could not be measured, or the file not be written.
    """
    result: dict[str, Any] = {
        "what": "variants of training that take turns in one process; ratios round by round",
        "settings": {**asdict(settings), "chains": settings.chains and "a file"},
        **environment(),
        "chains": {},
        "measures": {},
        "held_out": None,
        "failures": [],
        "targets": [],
    }
    result["machine"]["threads"] = settings.threads
    if settings.model is not None and Path(settings.model).is_dir():
        result["settings"]["model"] = Path(settings.model).name
    for name, measure in _measures(settings, result):
        result["measures"][name] = measure
        result["targets"] = training_targets(result["measures"], settings.device.startswith("cuda"))
        if out is not None:
            write_json(out, result)
    if out is not None:
        write_json(out, result)
    return result


def training_targets(measures: Mapping[str, Any], on_gpu: bool) -> list[dict[str, Any]]:
    """The bars of the project that were measured."""
    found = []
    for name, one, other, kind, on_cpu, on_cuda in TARGETS:
        rows = measures[name]["variants"] if name in measures else {}
        if one in rows and other in rows:
            limit = on_cuda if on_gpu else on_cpu
            ratio = paired(rows[one]["rounds"], rows[other]["rounds"])
            met = ratio["median"] <= limit if kind == "at_most" else ratio["median"] >= limit
            found.append({"target": f"{name}: {one} over {other}", kind: limit, "ratio": ratio, "met": met})
    return found


def _measures(settings: TrainingBenchSettings, result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    training = settings.training
    if "memory" in settings.measures:  # first: nothing else is in the memory yet
        peaks = {}
        for name in ARMS:
            say(f"{MEMORY}: {name}")
            peaks[name] = [peak_mb_in_subprocess(asdict(settings), name, "mote.experiments.bench.trainers")]
        yield MEMORY, {"unit": "MB", **_compared(peaks, SFT_PADDED, (SFT_AGAIN, SFT_PADDED))}
    say(f"loading {settings.model or settings.shape} ({settings.dtype}, {settings.device})")
    chains = Path(settings.chains) if settings.chains else None
    workload = prepare(settings.model, settings.shape, settings.device, settings.dtype, chains, settings.count)
    result["chains"] = {"source": workload.source, **facts(workload.rows)}
    if {"skipping", "masks"} & set(settings.measures):
        yield from _passes(settings, workload, result)
    if "trainers" in settings.measures:
        epochs = {name: build(name, workload, training) for name in ARMS if name != SFT_AGAIN}
        epochs[SFT_AGAIN] = epochs[SFT_PADDED]
        speeds = _interleaved(SPEED, epochs, settings.rounds)
        yield SPEED, {"unit": "tokens/s", **_compared(speeds, SFT_PADDED, (SFT_AGAIN, SFT_PADDED))}
        del epochs
    if "held-out" in settings.measures:
        seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
        result["held_out"] = compare_held_out(workload, seeds, settings.trained_on, settings.epochs)


def _passes(
    settings: TrainingBenchSettings, workload: Workload, result: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is measured on chains of all three steps, and an epoch of all chains."""
    given, on_gpu = settings.training, settings.device.startswith("cuda")
    model = with_experts(workload, workload.config, on_gpu)
    make_mask, pad_id = (block_mask if on_gpu else document_mask), workload.tokenizer.pad_token_id
    whole = [row for row in workload.rows if {1, 2, 3} <= set(row.steps)][: settings.whole]
    if not whole:
        raise UserError("chains: none has analysis, guidance and response; give a file with some, or a larger --count")
    result["chains"]["of all three steps"] = facts(whole)

    def packed(rows: Any, skip_p: float, draws: int = 1) -> Pass:
        return Pass(model, batches(rows, skip_p, given.length, 1, pad_id, settings.device, draws), make_mask)

    if "skipping" in settings.measures:
        built = [form for row in whole for form in seven(row)]
        result["chains"]["step views, masked and built"] = [step_views(whole), step_views(built)]
        passes = {SEVEN: packed(built, 0.0), MASKED: packed(whole, given.skip_p),
                  TWO_VIEWS: packed(whole, given.skip_p, 2)}  # fmt: skip
        flops = {name: [one.flops()] for name, one in passes.items()}
        yield FLOPS, {"unit": "FLOP", **_compared(flops, SEVEN, None)}
        mixed = {SEVEN: packed([f for row in workload.rows for f in seven(row)], 0.0),
                 MASKED: packed(workload.rows, given.skip_p),
                 TWO_VIEWS: packed(workload.rows, given.skip_p, 2)}  # fmt: skip
        yield f"{FLOPS}, all depths", {
            "unit": "FLOP", **_compared({name: [one.flops()] for name, one in mixed.items()}, SEVEN, None),
        }  # fmt: skip
        seconds = _interleaved(TIME, {**passes, MASKED_AGAIN: passes[MASKED]}, settings.rounds)
        yield TIME, {"unit": "s", **_compared(seconds, SEVEN, (MASKED_AGAIN, MASKED))}
    if "masks" in settings.measures:
        for case, length, per_batch in (("one chain a row", None, given.batch), ("packed rows", given.length, 1)):
            drawn = batches(whole, given.skip_p, length, per_batch, pad_id, settings.device)
            causal = Pass(model, drawn, None)
            if on_gpu:  # the fastest causal attention there is
                causal = Pass(with_experts(workload, workload.config, False), drawn, None)
            steps = {CAUSAL: causal, CAUSAL_AGAIN: causal, MASKS: Pass(model, drawn, make_mask)}
            name = f"training step, {case}"
            yield name, {"unit": "s", **_compared(_interleaved(name, steps, settings.rounds), CAUSAL,
                                                  (CAUSAL_AGAIN, CAUSAL))}  # fmt: skip


def _interleaved(name: str, actions: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    say(f"{name}: warming up")
    for action in {id(action): action for action in actions.values()}.values():
        action()
    say(f"{name}: {rounds} rounds")
    return interleave(actions, rounds)


def _compared(values: dict[str, list[float]], reference: str, again: tuple[str, str] | None) -> dict[str, Any]:
    """Each variant over the reference, and the A/A control: what is measured twice, over itself."""
    found: dict[str, Any] = {"variants": compare(values, {"ratio": reference})}
    if again is not None:
        found["control"] = {"of": again[1], "ratio": paired(values[again[0]], values[again[1]])}
    return found


def held_out_lines(result: Mapping[str, Any]) -> str:
    """The held-out comparison, a line for each kind of draws; empty where there was none."""
    lines = []
    for name, found in (result["held_out"] or {"draws": {}})["draws"].items():
        met = "met" if abs(found["median"] - 1) <= 0.01 else "NOT MET"
        lines.append(
            f"\n{met:<8} held-out loss, masked with {name} over seven data sets: {found['median']:.4f} (within 1 %), "
            f"{found['ratios']}; of whole chains alone {found['median of whole chains']:.4f}"
        )
    return "".join(lines)
