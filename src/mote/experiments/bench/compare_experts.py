"""`mote bench experts`: cost of step experts against plain LoRA, naive implementations and token-gated experts."""

import gc
import statistics
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mote.core.errors import UserError
from mote.core.files import write_json
from mote.core.machine import environment
from mote.experiments.bench.expert_settings import ExpertBenchSettings, load_model
from mote.experiments.bench.measurements import (
    TOKENS,
    DecodingStep,
    TrainingStep,
    make_batch,
    make_current,
    peak_mb_on_gpu,
    saved_mb,
)
from mote.experiments.bench.peak_memory import peak_mb_in_subprocess
from mote.experiments.bench.peft_path import peft_measures
from mote.experiments.bench.targets import expert_targets
from mote.experiments.bench.timing import compare, interleave, say
from mote.experiments.bench.variants import BASE, CONTROL, REFERENCE, STEPS, UNCOMPILED, Variant, build, share

BACKEND = "inductor"
Measure = tuple[str, str, dict[str, list[float]]]  # name, unit, variant -> rounds


def compare_variants(settings: ExpertBenchSettings, out: Path | None = None) -> dict[str, Any]:
    """Measure everything; the JSON file is rewritten after each measurement.

    Returns:
        The content of the JSON file: settings, versions, machine, trained parameters, measures by name, targets.

    Raises:
        UserError: The reference does not fit into the GPU's memory, or `out` is a folder.
        MoteError: Peak memory could not be measured, or the file could not be written.
    """
    if out is not None and out.is_dir():
        raise UserError(f"out: {out} is a folder; give the name of a JSON file")
    say(f"loading {settings.model or settings.shape} ({settings.dtype}, {settings.device})")
    make_current(settings.device)
    bench = _Bench(settings)
    result: dict[str, Any] = {
        "what": f"each variant over {REFERENCE}, round by round in one process; {CONTROL} is the A/A control",
        "settings": asdict(settings),
        **environment(),
        "reference": REFERENCE,
        "trained_parameters": bench.trained,
        "measures": {},
        "failures": bench.failures,
        "targets": [],
    }
    result["machine"]["threads"] = settings.threads
    if settings.model is not None and Path(settings.model).is_dir():
        result["settings"]["model"] = Path(settings.model).name  # without the local path
    for name, unit, values in bench.measures():
        result["measures"][name] = {"unit": unit, "variants": compare(values, {"ratio": REFERENCE, "over_base": BASE})}
        result["targets"] = expert_targets(result["measures"])
        if out is not None:
            write_json(out, result)
    return result


class _Bench:
    """The base model, its variants, and the measurements."""

    def __init__(self, settings: ExpertBenchSettings) -> None:
        self.settings = settings
        self.on_gpu = settings.device.startswith("cuda")
        self.base = load_model(settings)
        self.vocab = self.base.config.vocab_size
        self.batch = make_batch(settings.rows, settings.length, self.vocab, settings.device)
        self.trained: dict[str, int] = {}
        self.failures: list[dict[str, str]] = []

    def measures(self) -> Iterator[Measure]:
        """Run the measurements one after the other."""
        modes = (False,) * self.settings.eager + (True,) * self.settings.compiled
        if "peft" in self.settings.measures and not self.on_gpu:
            yield from peft_measures(self.base, self.batch, self.settings.rounds)
        if {"training", "decoding", "saved"} & set(self.settings.measures):
            yield from self._side_by_side(modes)
        if "memory" in self.settings.measures:
            for compiled in modes if self.on_gpu else (False,):
                yield self._peaks(compiled)

    def _build(self, name: str) -> Variant:
        variant = build(name, share(self.base, name), self.settings.checkpointing)
        self.trained[name] = sum(parameter.numel() for parameter in variant.trained())
        return variant

    def _side_by_side(self, modes: tuple[bool, ...]) -> Iterator[Measure]:
        """The measurements with all variants in memory at once."""
        everything = {name: self._build(name) for name in self.settings.variants}
        if "saved" in self.settings.measures:
            saved = {name: partial(saved_mb, TrainingStep(v, self.batch)) for name, v in everything.items()}
            yield "saved activations", "MB", self._once("saved activations", saved)
        for compiled in modes:
            variants = {name: v for name, v in everything.items() if not (compiled and name in UNCOMPILED)}
            if "training" in self.settings.measures:
                with compiled_parts(variants.values(), compiled, whole=False):
                    yield self._training(variants, _named("training step", compiled))
            if "decoding" in self.settings.measures:
                with compiled_parts(variants.values(), compiled, whole=True):
                    yield from self._decoding(variants, compiled)

    def _training(self, variants: Mapping[str, Variant], measure: str) -> Measure:
        steps = {name: TrainingStep(variant, self.batch) for name, variant in variants.items()}
        self._once(measure, steps)
        say(f"{measure}: {self.settings.rounds} rounds")
        return measure, "s", interleave(steps, self.settings.rounds)

    def _decoding(self, variants: Mapping[str, Variant], compiled: bool) -> Iterator[Measure]:
        for case, steps in _decoding_cases(self.settings.decoding_rows).items():
            measure = _named(f"decoding {case}", compiled)
            decodings = {
                name: DecodingStep(variant, torch.tensor(steps, device=self.settings.device), self.vocab)
                for name, variant in variants.items()
                if len(set(steps)) == 1 or variant.takes_steps or name in (REFERENCE, CONTROL)
            }
            for decoding in decodings.values():
                decoding.prefill()
            self._once(measure, decodings)
            say(f"{measure}: {self.settings.rounds} rounds")
            medians: dict[str, list[float]] = {name: [] for name in decodings}
            means: dict[str, list[float]] = {name: [] for name in decodings}
            for _ in range(self.settings.rounds):
                for decoding in decodings.values():
                    decoding.prefill()
                for name, seconds in interleave(decodings, TOKENS).items():
                    medians[name].append(statistics.median(seconds))
                    means[name].append(statistics.mean(seconds))
            yield measure, "s", medians
            yield f"{measure}, mean with first token", "s", means

    def _peaks(self, compiled: bool) -> Measure:
        """The measurements with one variant in memory at a time."""
        names = [name for name in self.settings.variants if not (compiled and name in UNCOMPILED)]
        measure = _named("peak memory", compiled)
        if self.on_gpu:
            return (
                measure,
                "MB",
                self._once(measure, {name: partial(self._peak_on_gpu, name, compiled) for name in names}),
            )
        separate = {name: partial(peak_mb_in_subprocess, asdict(self.settings), name) for name in names}
        return measure, "MB", self._once(measure, separate)

    def _peak_on_gpu(self, name: str, compiled: bool) -> float:
        variant = self._build(name)
        with compiled_parts([variant], compiled, whole=False):
            return peak_mb_on_gpu(variant, self.batch)

    def _once(self, measure: str, actions: dict[str, Any]) -> dict[str, list[float]]:
        """Result of each action; one that runs out of GPU memory is removed from `actions` and noted as a failure.

        Raises:
            UserError: The reference does not fit.
        """
        say(f"{measure}: {len(actions)} variants")
        values = {}
        for name, action in list(actions.items()):
            try:
                values[name] = [float(action())]
            except torch.OutOfMemoryError as error:
                if name == REFERENCE:
                    raise UserError(
                        f"rows: {measure} does not fit into the GPU's memory; give fewer --rows, a smaller --length or "
                        "--checkpointing"
                    ) from error
                del actions[name]
                self.failures.append({"measure": measure, "variant": name, "reason": "out of memory"})
            if self.on_gpu:
                gc.collect()
                torch.cuda.empty_cache()
        return values


def _decoding_cases(rows: Iterable[int]) -> dict[str, list[int]]:
    """The step of each row: all in the last one, and beyond one row also in different steps."""
    last = len(STEPS)
    cases = {}
    for count in rows:
        name = {1: "one row", 8: "eight rows"}.get(count, f"{count} rows")
        cases[name] = [last] * count
        if count > 1:
            cases[f"{name} in different steps"] = [1 + row % last for row in range(count)]
    return cases


def _named(measure: str, compiled: bool) -> str:
    return f"{measure}, compiled" if compiled else measure


@contextmanager
def compiled_parts(variants: Iterable[Variant], compiled: bool, whole: bool) -> Iterator[None]:
    """Compile each block of the variants (one graph for all of them), or for decoding the whole stack of blocks.

    When decoding, a block indexes the cache by its layer number, so that each block would be a separate graph.
    """
    if not compiled:
        yield
        return
    torch._dynamo.reset()
    parts = [part for v in variants for part in ([v.causal.model] if whole else v.causal.model.layers)]
    # The default limit is eight graphs per code object: the ninth variant would silently run uncompiled.
    limits: dict[str, Any] = {
        "recompile_limit": 1024,
        "accumulated_recompile_limit": 4096,
        "fail_on_recompile_limit_hit": True,
    }
    with torch._dynamo.config.patch(limits):
        for part in parts:
            part.compile(dynamic=False, backend=BACKEND)
        try:
            yield
        finally:
            for part in parts:
                part._compiled_call_impl = None
