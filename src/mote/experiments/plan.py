"""What a run will make, need and take, worked out before anything starts: `mote run RECIPE --dry-run`.

Everything but the count of trained parameters is a rough estimate; each formula stands in its function's docstring.
The model need not be here: its shape is enough. Legend: N parameters that multiply a token, A trained ones,
V vocabulary, D hidden size, F intermediate size, R rank, E experts.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mote.core.methods import apply_method, steps_of
from mote.core.recipe import Recipe
from mote.core.records import Frozen
from mote.core.scheme import ADAPTIVE, BASE, CHECKED, Scheme, load_scheme
from mote.models.memory_estimate import (
    BYTES,
    RUNTIME_BYTES,
    advice,
    checkpoints,
    device_memory,
    training_bytes,
    weights_bytes,
)
from mote.models.shapes import ModelShape, active_parameters, count_parameters, count_trainable, find_shape
from mote.questions.files import OWN
from mote.questions.load import load_questions

REACH = (1.0, 0.715, 0.614)  # share of the paper's 6,000 questions that go on to each depth (section 3.1)
AGAIN = 0.1  # share of texts that are written anew at each retry; a guess
WRITTEN = 0.5  # tokens of a text / tokens it may have; a guess that suits 256
TEMPLATE_TOKENS, EXAMPLE_TOKENS, CHARS_PER_TOKEN = 100, 150, 4
UNKNOWN_COUNT, UNKNOWN_TOKENS = 1000, 150  # questions that cannot be read yet: how many, how long
EFFICIENCY = 0.5  # share of the measured matrix throughput that a model reaches
LAYER_OVERHEAD = 0.8e-3  # seconds of Python that a layer costs in a decoding step of transformers
REPORT_SECONDS = 10.0


class Machine(Frozen):
    """What was measured on this machine; `memory` is the device's, in bytes."""

    device: str
    dtype: str
    flops: float
    bandwidth: float
    memory: int


class Stage(Frozen):
    """One stage of a run: what it makes, tokens that go through the model, seconds (None: not known here)."""

    name: str
    what: str
    tokens: int
    seconds: float | None


class Plan(Frozen):
    """A run, worked out. Bytes and seconds are rough estimates, `trainable` is exact for a Llama-like base."""

    name: str
    model: str
    shape: ModelShape
    shape_source: str
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
        """All stages whose time is known."""
        return sum(stage.seconds or 0 for stage in self.stages)

    def table(self) -> str:
        """The plan as text, for a terminal."""
        shape, machine = self.shape, self.machine
        rows = [(s.name, _count(s.tokens) if s.tokens else "-", _time(s.seconds), s.what) for s in self.stages]
        rows.append(("in all", _count(sum(s.tokens for s in self.stages)), _time(self.seconds), "rough estimate"))
        return "\n".join(
            [
                f"plan of '{self.name}' (memory and time are a rough estimate)",
                f"model    {self.model}: {_count(self.parameters)} parameters in {self.dtype}",
                f"shape    {shape.layers} layers, hidden {shape.hidden}, intermediate {shape.intermediate}, vocabulary "
                f"{shape.vocab} ({self.shape_source})",
                f"machine  {machine.device} with {_size(machine.memory)}; measured now: {_count(machine.flops)}"
                f"FLOP/s in {machine.dtype} matrix products, {machine.bandwidth / 1e9:.1f} GB/s copying memory",
                "",
                f"{'stage':<10}{'tokens':>9}{'time':>12}  what",
                *(f"{name:<10}{tokens:>9}{spent:>12}  {what}" for name, tokens, spent, what in rows),
                "",
                f"adapter  {self.trainable:,} trained parameters, {_size(self.adapter_bytes)} on disk",
                f"memory   {_size(self.generation_bytes)} to generate, {_size(self.training_bytes)} to train (peaks)",
                *(f"note     {note}" for note in self.notes),
            ]
        )


def plan(recipe: Recipe, machine: Machine | None = None) -> Plan:
    """Work out what a run makes, needs and takes.

    Args:
        recipe: The run's settings.
        machine: Throughput to reckon with; measured now where it is not given (about half a second).

    Raises:
        UserError: A setting cannot work, a question file is bad, or there is no shape to be had for the model.
    """
    from mote.train import check_settings

    scheme = load_scheme(recipe.scheme)
    notes: list[str] = []
    shape, shape_source = find_shape(recipe, notes)
    device, dtype = _device(recipe, notes)
    check_settings(recipe, scheme, Path("runs"))
    recipe, steps = apply_method(recipe, scheme), steps_of(recipe, scheme)
    trainable = count_trainable(recipe, shape, len(steps))
    asked = _questions(recipe.questions, recipe.limit, recipe, "questions", notes)
    answered = _questions(recipe.answer.questions, recipe.answer.limit, recipe, "answer.questions", notes)
    machine = machine or measure(device)
    run = _Run(recipe, scheme, shape, dtype, trainable, machine)
    generation, needs = run.generation_bytes(asked, answered), (recipe, shape, dtype, trainable, len(steps))
    training = training_bytes(*needs, run.row_length(asked))
    if recipe.engine != "transformers":
        notes.append(f"chains are made by {recipe.engine}; their time is not known here")
    if generation > machine.memory:
        notes.append(f"generating does not fit into {_size(machine.memory)} of {device}; use a smaller model or batch")
    elif training > machine.memory:
        turns = advice(*needs, run.row_length(asked), machine.memory)
        notes.append(f"training may not fit into {_size(machine.memory)} of {device}; turn {' '.join(turns)}")
    return Plan(
        name=recipe.name,
        model=recipe.model,
        shape=shape,
        shape_source=shape_source,
        dtype=dtype,
        parameters=count_parameters(shape),
        trainable=trainable,
        stages=(
            Stage(name="questions", what=f"{asked.count} from {recipe.questions}", tokens=0, seconds=0.0),
            run.chains(asked),
            run.training(asked),
            run.answers(answered),
            Stage(name="report", what="report.json, report.html", tokens=0, seconds=REPORT_SECONDS),
        ),
        adapter_bytes=4 * trainable,
        generation_bytes=generation,
        training_bytes=training,
        machine=machine,
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Asked:
    """Questions of a stage: how many, tokens of the mean one and of the longest one (characters / 4)."""

    count: int
    mean: float
    longest: int


def _questions(source: str, limit: int | None, recipe: Recipe, setting: str, notes: list[str]) -> _Asked:
    """Read the questions; a file that is not there yet is noted and its size is taken from the limit."""
    if source not in OWN and not source.startswith("mote:") and not Path(source).expanduser().exists():
        whence = "the limit" if limit else "a guess: there is no limit"
        notes.append(
            f"{setting}: {source} is not here; reckoned with {limit or UNKNOWN_COUNT} questions ({whence}) of "
            f"{UNKNOWN_TOKENS} tokens"
        )
        return _Asked(limit or UNKNOWN_COUNT, UNKNOWN_TOKENS, 4 * UNKNOWN_TOKENS)
    rows = load_questions(source, limit, recipe.chains.max_question_chars)
    lengths = [sum(len(message.content) // CHARS_PER_TOKEN + 5 for message in row.messages) for row in rows]
    return _Asked(len(rows), sum(lengths) / len(rows), max(lengths))


def expected_steps(scheme: Scheme, mode: str) -> float:
    """Steps that an answer writes: those of the mode; 1 for the base model.

    With adaptive length it is the mean over REACH; an answer that checks itself writes every chain it reaches.
    """
    if mode == BASE:
        return 1.0
    chains = scheme.chains_of(mode)
    if mode == CHECKED:
        return sum(_reach(depth) * len(chain) for depth, chain in enumerate(chains))
    if mode != ADAPTIVE:
        return float(len(chains[0]))
    reached = [*(_reach(depth) for depth in range(len(chains))), 0.0]
    return sum((reached[i] - reached[i + 1]) * len(chain) for i, chain in enumerate(chains))


def expected_texts(scheme: Scheme, retries: int) -> float:
    """Texts written for one chain: each depth it reaches writes its new steps and an answer, some of them anew."""
    texts, known = 0.0, {scheme.answer}
    for depth, mode in enumerate(scheme.depths):
        stages = set(scheme.stages_of(mode))
        texts += _reach(depth) * (len(stages - known) + 1)
        known |= stages
    return texts * (1 + AGAIN * retries)


def _reach(depth: int) -> float:
    return REACH[min(depth, len(REACH) - 1)]


@dataclass(frozen=True)
class _Run:
    """A run's stages, worked out one by one."""

    recipe: Recipe
    scheme: Scheme
    shape: ModelShape
    dtype: str
    trainable: int
    machine: Machine

    def chains(self, asked: _Asked) -> Stage:
        """Each text and each check reads its prompt; worked examples are read once a stage."""
        settings = self.recipe.chains
        texts = asked.count * expected_texts(self.scheme, settings.retries)
        checks = asked.count * sum(_reach(depth) for depth in range(len(self.scheme.depths)))
        written = WRITTEN * settings.max_tokens
        read = (texts + checks) * (asked.mean + TEMPLATE_TOKENS + written)
        read += (2 * len(self.scheme.depths)) * settings.examples * EXAMPLE_TOKENS
        here = self.recipe.engine == "transformers"
        seconds = self._reading(read) + self._decoding(texts, settings.batch_size, settings.max_tokens)
        return Stage(
            name="chains",
            what=f"{asked.count} chains of {expected_steps(self.scheme, ADAPTIVE):.1f} steps: {texts:.0f} texts and "
            f"{checks:.0f} checks",
            tokens=round(texts * written + read),
            seconds=seconds if here else None,
        )

    def training(self, asked: _Asked) -> Stage:
        """4 N + 6 A FLOPs a token: 6 N less the frozen weights' gradients, and the experts whole.

        Gradient checkpointing computes the forward pass, 2 N, once more.
        """
        settings = self.recipe.train
        rows = max(1, round(asked.count * (1 - settings.held_out)))
        steps = expected_steps(self.scheme, ADAPTIVE)
        texts = 1 + (steps - 1) * settings.skip_views  # the first step stands in a row once
        length = min(settings.max_length, asked.mean + texts * (WRITTEN * self.recipe.chains.max_tokens + 2))
        together = settings.max_length / length if settings.packing else 1  # chains in a row
        batch = round(settings.per_device_train_batch_size * settings.gradient_accumulation_steps * together)
        tokens = rows * length * settings.num_train_epochs
        flops = (6 if checkpoints(self.recipe) else 4) * active_parameters(self.shape) + 6 * self.trainable
        updates = -(-rows // batch) * settings.num_train_epochs
        return Stage(
            name="train",
            what=f"{updates:.0f} updates of {batch} chains, from at most {rows} chains of {length:.0f} tokens",
            tokens=round(tokens),
            seconds=tokens * flops / (EFFICIENCY * self.machine.flops),
        )

    def answers(self, asked: _Asked) -> Stage:
        """As chains are written, in each mode; the experts count as parameters of the model."""
        settings = self.recipe.answer
        texts = asked.count * sum(expected_steps(self.scheme, mode) for mode in settings.modes)
        read = asked.count * len(settings.modes) * asked.mean
        slower = 1 + self.trainable / active_parameters(self.shape)
        decoding = self._decoding(texts, settings.batch_size, settings.max_step_tokens)
        return Stage(
            name="answer",
            what=f"{asked.count} from {settings.questions} in {len(settings.modes)} modes: {', '.join(settings.modes)}",
            tokens=round(texts * WRITTEN * settings.max_step_tokens + read),
            seconds=slower * (self._reading(read) + decoding),
        )

    def _decoding(self, texts: float, batch: int, tokens: int) -> float:
        """Seconds to write texts in batches, each as long as its longest text, which is taken to be the limit.

        A decoding step takes the largest of: weights / bandwidth, 2 N * batch / (FLOP/s it
        reaches), Python's time for the layers.
        """
        weights = active_parameters(self.shape) * BYTES[self.dtype] / self.machine.bandwidth
        products = self._reading(batch)
        return texts / batch * tokens * max(weights, products, self.shape.layers * LAYER_OVERHEAD)

    def _reading(self, tokens: float) -> float:
        """Seconds of 2 N FLOPs a token."""
        return 2 * active_parameters(self.shape) * tokens / (EFFICIENCY * self.machine.flops)

    def generation_bytes(self, asked: _Asked, answered: _Asked) -> int:
        """Weights, experts in float32; for a full batch keys, values, one layer's activations, two rows of logits."""
        settings, shape = self.recipe.chains, self.shape
        prompt = asked.longest + TEMPLATE_TOKENS + settings.examples * EXAMPLE_TOKENS + 3 * settings.max_tokens
        answer = answered.longest + len(self.scheme.steps) * self.recipe.answer.max_step_tokens
        batches = ((settings.batch_size, prompt), (self.recipe.answer.batch_size, answer))
        kept = 2 * shape.layers * shape.kv_heads * shape.head_size + 2 * shape.intermediate + 6 * shape.hidden
        working = max(batch * (length * kept * BYTES[self.dtype] + 2 * shape.vocab * 4) for batch, length in batches)
        return round(RUNTIME_BYTES + weights_bytes(shape, self.dtype) + 4 * self.trainable + working)

    def row_length(self, asked: _Asked) -> int:
        """Tokens of the longest row that is trained on."""
        settings = self.recipe.train
        texts = 1 + (len(self.scheme.steps) - 1) * settings.skip_views
        longest = asked.longest + texts * (self.recipe.chains.max_tokens + 2)
        return settings.max_length if settings.packing else min(settings.max_length, longest)


def _device(recipe: Recipe, notes: list[str]) -> tuple[str, str]:
    """The device to measure and the dtype of the weights."""
    from mote.models.load import default_device, default_dtype

    here = default_device()
    device = here if recipe.device == "auto" else recipe.device
    dtype = default_dtype(device) if recipe.dtype == "auto" else recipe.dtype
    if device.startswith("cuda") and here != "cuda":
        notes.append(f"device '{device}' is not on this machine; time and memory are those of its {here}")
        device = here
    return device, dtype


def measure(device: str, seconds: float = 0.5) -> Machine:
    """Time matrix products (bfloat16 on a GPU, float32 on a CPU) and copies of a large block, half the time each.

    A copy of B bytes moves 2 B. A GPU's memory is its total, a CPU's the machine's.
    """
    import torch

    on_gpu = device.startswith("cuda")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    size = 8192 if on_gpu else 1024
    left = torch.ones(size, size, dtype=dtype, device=device)
    out = torch.empty_like(left)
    source = torch.ones((256 if on_gpu else 64) * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    wait: Callable[[], object] = torch.cuda.synchronize if on_gpu else lambda: None
    products = _rate(lambda: torch.mm(left, left, out=out), wait, seconds / 2)
    copies = _rate(lambda: target.copy_(source), wait, seconds / 2)
    return Machine(
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        flops=2 * size**3 * products,
        bandwidth=2 * source.numel() * copies,
        memory=device_memory(device),
    )


def _rate(work: Callable[[], object], wait: Callable[[], object], seconds: float) -> float:
    """How often a second the work is done, after once for warming up."""
    work()
    wait()
    began, done = time.perf_counter(), 0
    while not done or time.perf_counter() - began < seconds:
        work()
        wait()
        done += 1
    return done / (time.perf_counter() - began)


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
