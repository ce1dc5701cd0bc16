"""Rough estimates of a run's tokens, time and memory; each formula is in its function's docstring.

Legend: W parameters that multiply a token, A trained parameters.
"""

from dataclasses import dataclass
from pathlib import Path

from mote.core.recipe import Recipe
from mote.core.records import Frozen
from mote.core.scheme import ADAPTIVE, BASE, CHECKED, Scheme
from mote.evals.attacks import UNDER_TECHNIQUES, load_techniques
from mote.evals.suite_config import Suite, SuiteTask
from mote.experiments.throughput import Machine
from mote.models.memory_estimate import BYTES, RUNTIME_BYTES, advice, checkpoints, training_bytes, weights_bytes
from mote.models.shapes import ModelShape, active_parameters
from mote.questions.files import OWN
from mote.questions.load import load_questions

REACH = (1.0, 0.715, 0.614)  # share of the paper's 6,000 questions that reach each depth (section 3.1)
RETRIED = 0.1  # share of texts that each retry generates again; a guess
USED_BUDGET = 0.5  # mean length of a text / its token budget where no worked example shows one; a guess
TEMPLATE_TOKENS = 100
EXAMPLE_TOKENS = 150
CHARS_PER_TOKEN = 4
UNKNOWN_COUNT = 1000  # assumed number of questions while their file does not exist
UNKNOWN_TOKENS = 150  # assumed mean length of such a question
EFFICIENCY = 0.5  # share of the measured matmul throughput that a model reaches
LAYER_OVERHEAD = 0.8e-3  # seconds of Python per layer in a decoding step of transformers


class Stage(Frozen):
    """One stage of a run.

    Attributes:
        name: The stage.
        what: What it makes.
        tokens: Tokens that go through the model.
        seconds: Estimated time; None if another machine does the work.
    """

    name: str
    what: str
    tokens: int
    seconds: float | None


@dataclass(frozen=True)
class QuestionStats:
    """Number of questions of a stage, and tokens of the mean and of the longest one (characters / 4)."""

    count: int
    mean: float
    longest: int


def question_stats(source: str, limit: int | None, recipe: Recipe, setting: str, notes: list[str]) -> QuestionStats:
    """Read the questions; for a file that does not exist yet add a note and assume the limit as their number."""
    if source not in OWN and not source.startswith("mote:") and not Path(source).expanduser().exists():
        origin = "the limit" if limit else "a guess: there is no limit"
        notes.append(
            f"{setting}: {source} is not here; assumed {limit or UNKNOWN_COUNT} questions ({origin}) of "
            f"{UNKNOWN_TOKENS} tokens"
        )
        return QuestionStats(limit or UNKNOWN_COUNT, UNKNOWN_TOKENS, 4 * UNKNOWN_TOKENS)
    rows = load_questions(source, limit, recipe.chains.max_question_chars)
    lengths = [sum(len(message.content) // CHARS_PER_TOKEN + 5 for message in row.messages) for row in rows]
    return QuestionStats(len(rows), sum(lengths) / len(rows), max(lengths))


def expected_steps(scheme: Scheme, mode: str) -> float:
    """Mean number of steps in an answer of the mode; 1 for the base model.

    For adaptive length it is the mean over REACH; a self-checking answer generates every chain that it reaches.
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
    """Mean number of texts generated for one chain: at each depth its new steps and an answer, plus retries."""
    texts = 0.0
    known = {scheme.answer}
    for depth, mode in enumerate(scheme.depths):
        stages = set(scheme.stages_of(mode))
        texts += _reach(depth) * (len(stages - known) + 1)
        known |= stages
    return texts * (1 + RETRIED * retries)


def text_tokens(scheme: Scheme, examples: int, budget: int) -> float:
    """Mean tokens of a text: those of the worked examples that the model imitates, at most its budget."""
    shown = [text for example in scheme.first_examples(examples) for text in example.steps.values()]
    mean = sum(map(len, shown)) / len(shown) / CHARS_PER_TOKEN if shown else USED_BUDGET * budget
    return min(mean, budget)


def _answers_to(task: SuiteTask, recipe: Recipe) -> tuple[int | None, list[str]]:
    """Questions of a task (None if neither the suite nor the recipe limits them) and the modes they are asked in."""
    modes = [mode for mode in recipe.answer.modes if task.modes is None or mode in task.modes]
    limits = [limit for limit in (task.limit, recipe.eval.limit) if limit is not None]
    techniques = len(load_techniques(None)) if task.task in UNDER_TECHNIQUES else 1
    return (min(limits) * techniques if limits else None), modes


def _reach(depth: int) -> float:
    return REACH[min(depth, len(REACH) - 1)]


@dataclass(frozen=True)
class RunEstimate:
    """Estimates of one run, stage by stage."""

    recipe: Recipe
    scheme: Scheme
    shape: ModelShape
    dtype: str
    trainable: int
    steps: int
    machine: Machine

    def chains(self, asked: QuestionStats) -> Stage:
        """Each text and each check prefills its prompt; worked examples are a shared prefix, prefilled once.

        Only checks of the model itself are counted: an offline rule takes no time, another judge's is not known here.
        """
        settings = self.recipe.chains
        texts = asked.count * expected_texts(self.scheme, settings.retries)
        checks = asked.count * sum(_reach(depth) for depth in range(len(self.scheme.depths)))
        checks *= settings.checks_itself
        length = self._text_tokens(settings.max_tokens)
        prompts = (texts + checks) * (asked.mean + TEMPLATE_TOKENS + length)
        prompts += (2 * len(self.scheme.depths)) * settings.examples * EXAMPLE_TOKENS
        local = self.recipe.engine == "transformers"
        seconds = self._prefill(prompts) + self._decoding(texts * length, settings.batch_size)
        return Stage(
            name="chains",
            what=f"{asked.count} chains of {expected_steps(self.scheme, ADAPTIVE):.1f} steps: {texts:.0f} texts and "
            f"{checks:.0f} checks",
            tokens=round(texts * length + prompts),
            seconds=seconds if local else None,
        )

    def training(self, asked: QuestionStats) -> Stage:
        """4 W + 6 A FLOPs per token: 6 W without the frozen weights' gradients, plus the experts in full.

        Gradient checkpointing repeats the forward pass, another 2 W.
        """
        settings = self.recipe.train
        rows = max(1, round(asked.count * (1 - settings.held_out)))
        steps = expected_steps(self.scheme, ADAPTIVE)
        texts = 1 + (steps - 1) * settings.skip_views  # all draws share the first step
        length = min(settings.max_length, asked.mean + texts * (self._text_tokens(self.recipe.chains.max_tokens) + 2))
        together = settings.max_length / length if settings.packing else 1  # chains per row
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

    def answers(self, asked: QuestionStats) -> Stage:
        """Prefill and decode in each mode; the experts count as parameters of the model."""
        settings = self.recipe.answer
        texts = asked.count * sum(expected_steps(self.scheme, mode) for mode in settings.modes)
        prompts = asked.count * len(settings.modes) * asked.mean
        slower = 1 + self.trainable / active_parameters(self.shape)
        written = texts * self._text_tokens(settings.max_step_tokens)
        decoding = self._decoding(written, settings.batch_size)
        return Stage(
            name="answer",
            what=f"{asked.count} from {settings.questions} in {len(settings.modes)} modes: {', '.join(settings.modes)}",
            tokens=round(written + prompts),
            seconds=slower * (self._prefill(prompts) + decoding),
        )

    def evaluation(self, suite: Suite) -> Stage:
        """Prefill and decode as for answers, with questions of assumed length; judging is not included."""
        counts = [_answers_to(task, self.recipe) for task in suite.tasks]
        known = [(count, modes) for count, modes in counts if count is not None]
        texts = sum(count * expected_steps(self.scheme, mode) for count, modes in known for mode in modes)
        answers = sum(count * len(modes) for count, modes in known)
        written = texts * self._text_tokens(suite.max_step_tokens)
        seconds = self._prefill(answers * UNKNOWN_TOKENS) + self._decoding(written, suite.batch_size)
        complete = len(known) == len(counts)
        return Stage(
            name="eval",
            what=f"suite {suite.name}: " + (f"{answers} judged answers" if complete else "all questions of its tasks"),
            tokens=round(written + answers * UNKNOWN_TOKENS) if complete else 0,
            seconds=seconds if complete else None,
        )

    def _text_tokens(self, budget: int) -> float:
        """Mean tokens of a step, in chains and in the answers of the model that is trained on them."""
        return text_tokens(self.scheme, self.recipe.chains.examples, budget)

    def _decoding(self, tokens: float, batch: int) -> float:
        """Seconds to generate tokens in a batch that stays full: a text enters as another one ends.

        A decoding step takes the largest of: weights / bandwidth, 2 W * batch / reached FLOP/s, Python overhead of
        the layers.
        """
        weights = active_parameters(self.shape) * BYTES[self.dtype] / self.machine.bandwidth
        matmuls = self._prefill(batch)
        return tokens / batch * max(weights, matmuls, self.shape.layers * LAYER_OVERHEAD)

    def _prefill(self, tokens: float) -> float:
        """Seconds at 2 W FLOPs per token."""
        return 2 * active_parameters(self.shape) * tokens / (EFFICIENCY * self.machine.flops)

    def generation_bytes(self, asked: QuestionStats, answered: QuestionStats) -> int:
        """Weights, experts in float32; per full batch the KV cache, one layer's activations, two rows of logits."""
        settings = self.recipe.chains
        shape = self.shape
        prompt = asked.longest + TEMPLATE_TOKENS + settings.examples * EXAMPLE_TOKENS + 3 * settings.max_tokens
        answer = answered.longest + len(self.scheme.steps) * self.recipe.answer.max_step_tokens
        batches = ((settings.batch_size, prompt), (self.recipe.answer.batch_size, answer))
        per_token = 2 * shape.layers * shape.kv_heads * shape.head_size + 2 * shape.intermediate + 6 * shape.hidden
        working = max(
            batch * (length * per_token * BYTES[self.dtype] + 2 * shape.vocab * 4) for batch, length in batches
        )
        return round(RUNTIME_BYTES + weights_bytes(shape, self.dtype) + 4 * self.trainable + working)

    def training_bytes(self, asked: QuestionStats) -> int:
        """Peak memory of training (`mote.models.memory_estimate`)."""
        return training_bytes(*self._training(asked))

    def memory_advice(self, asked: QuestionStats) -> list[str]:
        """Settings to change until training fits (`mote.models.memory_estimate`)."""
        return advice(*self._training(asked), self.machine.memory)

    def _training(self, asked: QuestionStats) -> tuple[Recipe, ModelShape, str, int, int, int]:
        return self.recipe, self.shape, self.dtype, self.trainable, self.steps, self.row_length(asked)

    def row_length(self, asked: QuestionStats) -> int:
        """Tokens of the longest training row."""
        settings = self.recipe.train
        texts = 1 + (len(self.scheme.steps) - 1) * settings.skip_views
        longest = asked.longest + texts * (self.recipe.chains.max_tokens + 2)
        return settings.max_length if settings.packing else min(settings.max_length, longest)
