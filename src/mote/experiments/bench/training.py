"""Cost of training: step skipping against the data sets it replaces, masks, packing, and TRL's trainer.

`benchmarks/training.py` describes the method and the workload.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mote.core.errors import UserError
from mote.core.files import write_json
from mote.core.machine import environment
from mote.experiments.bench.held_out import compare_held_out
from mote.experiments.bench.measurements import make_current
from mote.experiments.bench.peak_memory import peak_mb_in_subprocess
from mote.experiments.bench.skipping import Pass, batches, seven, step_occurrences
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
from mote.tokens.encode import Tokens
from mote.tokens.masks import MakeMask, mask_form, masks_for

MEASURES = ("memory", "skipping", "masks", "trainers", "held-out")
SEVEN = "seven data sets"
MASKED = "masked pass"
MASKED_AGAIN = "masked pass again"
TWO_DRAWS = "masked pass, two draws"
CAUSAL = "causal"
CAUSAL_AGAIN = "causal again"
MASKS = "masked"
FLOPS = "FLOPs of an epoch"
TIME = "time of an epoch"
SPEED = "training"
MEMORY = "peak memory"
TARGETS: tuple[
    tuple[str, str, str, str, float, float], ...
] = (  # measure, variant, reference, kind, limit on a CPU, on a GPU
    (FLOPS, MASKED, SEVEN, "at_most", 0.30, 0.30),
    (TIME, MASKED, SEVEN, "at_most", 0.35, 0.35),
    (FLOPS, TWO_DRAWS, SEVEN, "at_most", 0.30, 0.30),
    (TIME, TWO_DRAWS, SEVEN, "at_most", 0.35, 0.35),
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
    """Everything that the numbers depend on.

    Attributes:
        model: As in a recipe; None with a shape.
        shape: One of `mote.experiments.bench.expert_settings.SHAPES`.
        device: `cpu` or `cuda`.
        dtype: Dtype of the base model.
        chains: A file of chains; None for random ones.
        count: Number of chains.
        whole: Number of chains with all three steps, for step skipping and masks.
        rounds: Rounds of each measurement.
        threads: PyTorch's threads.
        training: Batch, lengths and skip probability.
        measures: Some of `MEASURES`.
        first_seed: First seed of the held-out comparison.
        seeds: Seeds of the held-out comparison.
        trained_on: Chains that an arm of the held-out comparison trains on, at most.
        epochs: Epochs of an arm of the held-out comparison.
        flex: Whether masked passes use FlexAttention.
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
    flex: bool = False


def choose(
    model: str | None, shape: str | None, device: str, dtype: str, only: str | None, held_out: bool, **given: Any
) -> TrainingBenchSettings:
    """The settings with the device's defaults.

    Raises:
        UserError: An unknown measure, or a model together with a shape.
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
    training = TrainerSettings(
        batch=chosen.pop("batch"),
        length=chosen.pop("length"),
        skip_p=chosen.pop("skip_p"),
        device=device,
        checkpointing=chosen.pop("checkpointing"),
    )
    return TrainingBenchSettings(
        model=model,
        shape=shape,
        device=device,
        dtype=default_dtype(device) if dtype == "auto" else dtype,
        threads=torch.get_num_threads(),
        training=training,
        measures=names,
        flex=on_gpu,
        **chosen,
    )


def measure_training(settings: TrainingBenchSettings, out: Path | None = None) -> dict[str, Any]:
    """Measure everything; the JSON file is rewritten after each measurement.

    Raises:
        UserError: The chains cannot be read, or none has all three steps.
        MoteError: Peak memory could not be measured, or the file could not be written.
    """
    result: dict[str, Any] = {
        "what": "variants of training, interleaved in one process; ratios round by round",
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
    make_current(settings.device)
    for name, measure in _measures(settings, result):
        result["measures"][name] = measure
        result["targets"] = training_targets(result["measures"], settings.device.startswith("cuda"))
        if out is not None:
            write_json(out, result)
    if out is not None:
        write_json(out, result)
    return result


def training_targets(measures: Mapping[str, Any], on_gpu: bool) -> list[dict[str, Any]]:
    """Each measured target with its ratio; the median decides whether it is met."""
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
    if "memory" in settings.measures:  # first, while nothing else is in memory
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
    """The measurements of single passes: on chains with all three steps, and FLOPs of an epoch over all chains."""
    given = settings.training
    model = with_experts(workload, workload.config, settings.flex)
    make_mask = masks_for(model.config, mask_form(model.config._attn_implementation))
    # FlexAttention is compared with causal SDPA, the fastest attention of a GPU.
    with_sdpa = with_experts(workload, workload.config, False) if settings.flex else model
    whole = [row for row in workload.rows if {1, 2, 3} <= set(row.steps)][: settings.whole]
    if not whole:
        raise UserError("chains: none has analysis, guidance and response; give a file with some, or a larger --count")
    result["chains"]["of all three steps"] = facts(whole)
    if "skipping" in settings.measures:
        expanded = [form for row in whole for form in seven(row)]
        result["chains"]["step occurrences, masked and built"] = [step_occurrences(whole), step_occurrences(expanded)]
        yield from _skipping(settings, workload, model, make_mask, with_sdpa, whole)
    if "masks" in settings.measures:
        pad_id = workload.tokenizer.pad_token_id
        for case, length, per_batch in (("one chain a row", None, given.batch), ("packed rows", given.length, 1)):
            drawn = batches(whole, given.skip_p, length, per_batch, pad_id, settings.device)
            causal = Pass(with_sdpa, drawn, None)
            name = f"training step, {case}"
            steps = {CAUSAL: causal, CAUSAL_AGAIN: causal, MASKS: Pass(model, drawn, make_mask)}
            seconds = _interleaved(name, steps, settings.rounds)
            yield name, {"unit": "s", **_compared(seconds, CAUSAL, (CAUSAL_AGAIN, CAUSAL))}


def _skipping(
    settings: TrainingBenchSettings,
    workload: Workload,
    model: Any,
    make_mask: MakeMask,
    counted: Any,
    whole: list[Tokens],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Time of masked passes against passes over the seven data sets, and FLOPs of the model `counted`.

    They are counted with SDPA, densely: a counter sees nothing inside a compiled FlexAttention.
    """
    given = settings.training

    def passes(model: Any, make_mask: MakeMask, rows: list[Tokens]) -> dict[str, Pass]:
        def packed(rows: Sequence[Tokens], skip_p: float, draws: int = 1) -> Pass:
            pad_id = workload.tokenizer.pad_token_id
            return Pass(model, batches(rows, skip_p, given.length, 1, pad_id, settings.device, draws), make_mask)

        return {
            SEVEN: packed([form for row in rows for form in seven(row)], 0.0),
            MASKED: packed(rows, given.skip_p),
            TWO_DRAWS: packed(rows, given.skip_p, draws=2),
        }

    dense = masks_for(counted.config, mask_form(counted.config._attn_implementation))
    for name, rows in ((FLOPS, whole), (f"{FLOPS}, all depths", workload.rows)):
        variants = passes(counted, dense, rows)
        flops = {variant: [one.flops()] for variant, one in variants.items()}
        yield name, {"unit": "FLOP", **_compared(flops, SEVEN, None)}
    three_steps = passes(model, make_mask, whole)
    seconds = _interleaved(TIME, {**three_steps, MASKED_AGAIN: three_steps[MASKED]}, settings.rounds)
    yield TIME, {"unit": "s", **_compared(seconds, SEVEN, (MASKED_AGAIN, MASKED))}


def _interleaved(name: str, actions: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    say(f"{name}: warming up")
    for action in {id(action): action for action in actions.values()}.values():
        action()
    say(f"{name}: {rounds} rounds")
    return interleave(actions, rounds)


def _compared(values: dict[str, list[float]], reference: str, again: tuple[str, str] | None) -> dict[str, Any]:
    """Each variant over the reference, and the A/A control: a variant measured twice, over itself."""
    found: dict[str, Any] = {"variants": compare(values, {"ratio": reference})}
    if again is not None:
        found["control"] = {"of": again[1], "ratio": paired(values[again[0]], values[again[1]])}
    return found


def held_out_lines(result: Mapping[str, Any]) -> str:
    """The held-out comparison, one line per masked arm; empty if it was not run."""
    lines = []
    for name, found in (result["held_out"] or {"draws": {}})["draws"].items():
        met = "met" if abs(found["median"] - 1) <= 0.01 else "NOT MET"
        lines.append(
            f"\n{met:<8} held-out loss, masked with {name} over seven data sets: {found['median']:.4f} (within 1 %), "
            f"{found['ratios']}; of whole chains alone {found['median of whole chains']:.4f}"
        )
    return "".join(lines)
