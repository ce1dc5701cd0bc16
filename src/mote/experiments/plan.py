"""Estimates a run's output, time and memory before it starts: `mote run RECIPE --dry-run`.

Only the number of trained parameters is exact. The model's files are not needed: its shape is enough.
"""

from pathlib import Path

from mote.core.methods import apply_method, steps_of
from mote.core.recipe import Recipe
from mote.core.records import Frozen
from mote.core.scheme import load_scheme
from mote.experiments.estimates import QuestionStats, RunEstimate, Stage, question_stats
from mote.experiments.eval_stage import inspect_is_installed, suite_of_run
from mote.experiments.throughput import Machine, measure
from mote.models.capabilities import Capabilities
from mote.models.shapes import ModelShape, count_parameters, count_trainable, find_shape

REPORT_SECONDS = 10.0


class Plan(Frozen):
    """The estimate of a run; `trainable` is exact for a Llama-like base, bytes and seconds are rough.

    `base` is what the base model can do; None if its configuration is not on this machine.
    """

    name: str
    model: str
    shape: ModelShape
    shape_source: str
    base: Capabilities | None
    dtype: str
    parameters: int
    trainable: int
    stages: tuple[Stage, ...]
    adapter_bytes: int
    generation_bytes: int
    training_bytes: int
    machine: Machine
    notes: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Total of the stages whose time is known."""
        return sum(stage.seconds or 0 for stage in self.stages)

    def table(self) -> str:
        """The plan as text, for a terminal."""
        shape = self.shape
        machine = self.machine
        rows = [(s.name, _count(s.tokens) if s.tokens else "-", _time(s.seconds), s.what) for s in self.stages]
        rows.append(("in all", _count(sum(s.tokens for s in self.stages)), _time(self.seconds), "rough estimate"))
        return "\n".join(
            [
                f"plan of '{self.name}' (memory and time are a rough estimate)",
                f"model    {self.model}: {_count(self.parameters)} parameters in {self.dtype}",
                f"shape    {shape.layers} layers, hidden {shape.hidden}, intermediate {shape.intermediate}, vocabulary "
                f"{shape.vocab} ({self.shape_source})",
                f"machine  {machine.device} with {_size(machine.memory)}; measured now: {_count(machine.flops)}"
                f"FLOP/s in {machine.dtype} matmuls, {machine.bandwidth / 1e9:.1f} GB/s copying memory",
                "",
                f"{'stage':<10}{'tokens':>9}{'time':>12}  what",
                *(f"{name:<10}{tokens:>9}{spent:>12}  {what}" for name, tokens, spent, what in rows),
                "",
                f"adapter  {self.trainable:,} trained parameters, {_size(self.adapter_bytes)} on disk",
                f"memory   {_size(self.generation_bytes)} to generate, {_size(self.training_bytes)} to train (peaks)",
                *(f"note     {note}" for note in self.notes),
                *(["", self.base.table()] if self.base else []),
            ]
        )


def plan(recipe: Recipe, machine: Machine | None = None) -> Plan:
    """Estimate a run.

    Args:
        recipe: The run's settings.
        machine: The machine's speed; measured now by default (about half a second).

    Raises:
        UserError: A setting cannot work, a question file is bad, or the model's shape is unknown.
    """
    from mote.train import check_settings

    scheme = load_scheme(recipe.scheme)
    notes: list[str] = []
    shape, shape_source = find_shape(recipe, notes)
    device, dtype = _device(recipe, notes)
    check_settings(recipe, scheme, Path("runs"))
    steps = len(steps_of(recipe, scheme))
    recipe = apply_method(recipe, scheme)
    base = _base(recipe, notes)
    trainable = count_trainable(recipe, shape, steps)
    questions = question_stats(recipe.questions, recipe.limit, recipe, "questions", notes)
    answered = question_stats(recipe.answer.questions, recipe.answer.limit, recipe, "answer.questions", notes)
    estimate = RunEstimate(recipe, scheme, shape, dtype, trainable, steps, machine or measure(device, dtype))
    suite = suite_of_run(recipe)
    if suite is not None and not inspect_is_installed():
        notes.append("eval: inspect-ai is not installed; the evaluation is left out (install mote-align[eval])")
        suite = None
    notes += _warnings(estimate, device, questions, answered)
    return Plan(
        name=recipe.name,
        model=recipe.model,
        shape=shape,
        shape_source=shape_source,
        base=base,
        dtype=dtype,
        parameters=count_parameters(shape),
        trainable=trainable,
        stages=(
            Stage(name="questions", what=f"{questions.count} from {recipe.questions}", tokens=0, seconds=0.0),
            estimate.chains(questions),
            estimate.training(questions),
            estimate.answers(answered),
            *([estimate.evaluation(suite)] if suite is not None else []),
            Stage(name="report", what="report.json, report.html", tokens=0, seconds=REPORT_SECONDS),
        ),
        adapter_bytes=4 * trainable,
        generation_bytes=estimate.generation_bytes(questions, answered),
        training_bytes=estimate.training_bytes(questions),
        machine=estimate.machine,
        notes=tuple(notes),
    )


def _base(recipe: Recipe, notes: list[str]) -> Capabilities | None:
    """What the base model can do.

    Raises:
        UserError: It cannot be trained with the recipe's settings.
    """
    from mote.inference.compare_base import described
    from mote.models.load import local_config
    from mote.train import check_base

    config = local_config(recipe.model, recipe.revision)
    if config is None:
        notes.append(f"what '{recipe.model}' supports is unknown until its configuration is on this machine")
        return None
    base = described(config)
    check_base(recipe, base)
    return base


def _warnings(estimate: RunEstimate, device: str, questions: QuestionStats, answered: QuestionStats) -> list[str]:
    """What is not estimated, and what does not fit into memory."""
    recipe = estimate.recipe
    memory = estimate.machine.memory
    warnings = []
    if recipe.engine != "transformers":
        warnings.append(f"chains are made by {recipe.engine}; their time is not known here")
    if estimate.generation_bytes(questions, answered) > memory:
        warnings.append(f"generating does not fit into {_size(memory)} of {device}; use a smaller model or batch")
    elif estimate.training_bytes(questions) > memory:
        changes = " ".join(estimate.memory_advice(questions))
        warnings.append(f"training may not fit into {_size(memory)} of {device}; set {changes}")
    return warnings


def _device(recipe: Recipe, notes: list[str]) -> tuple[str, str]:
    """The device to measure, and the dtype of the weights."""
    from mote.models.load import default_device, default_dtype

    here = default_device()
    device = here if recipe.device == "auto" else recipe.device
    dtype = default_dtype(device) if recipe.dtype == "auto" else recipe.dtype
    if device.startswith("cuda") and here != "cuda":
        notes.append(f"device '{device}' is not on this machine; time and memory are those of its {here}")
        device = here
    return device, dtype


def _count(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f}"


def _size(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
