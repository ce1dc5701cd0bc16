"""Renders chats to token ids for vLLM; special tokens come from the chat template only, as in `encode_prompt`.

vLLM renders a chat to text and tokenises that, so a user's `<|im_start|>` would start a turn. The step markers cannot
be typed in any case: the folder's tokenizer has no text for them.
"""

import copy
from collections.abc import Sequence
from typing import Any

from typing_extensions import override
from vllm.exceptions import VLLMValidationError
from vllm.renderers.hf import HfRenderer

from mote.core.dialogue import alternating_turns
from mote.core.scheme import BASE
from mote.serve.vllm.folder_config import ServedConfig
from mote.tokens.encode import encode_dialogue

_ROLES = ("system", "user", "assistant")


class StepRenderer(HfRenderer):
    """vLLM's renderer with a guarded tokenizer and the mode `base`."""

    def __init__(self, config: Any, tokenizer: Any) -> None:
        super().__init__(config, guard(tokenizer))
        self.served = ServedConfig.model_validate(config.model_config.hf_config.mote)

    def render_messages(self, messages: Any, params: Any) -> Any:
        """The parsed conversation and the prompt with its token ids."""
        conversation, prompt = super().render_messages(messages, params)
        return conversation, self._with_mode(prompt, params)

    @override
    async def render_messages_async(self, messages: Any, params: Any) -> Any:
        conversation, prompt = await super().render_messages_async(messages, params)
        return conversation, self._with_mode(prompt, params)

    def _with_mode(self, prompt: Any, params: Any) -> Any:
        """For mode `base`, replace the first token by its twin, which selects the base model."""
        if params.chat_template_kwargs.get("mode") != BASE:
            return prompt
        opening, twin = self.served.opening
        ids = prompt["prompt_token_ids"]
        if ids[0] != opening:
            raise VLLMValidationError("mode='base': the chat template does not begin as the exported one does")
        return {**prompt, "prompt_token_ids": [twin, *ids[1:]]}

    def validate_token_ids(self, token_ids: Sequence[int], *, parameter: str | None = None) -> None:
        """Refuse ids outside the vocabulary and step markers, which only the model generates.

        Raises:
            VLLMValidationError: The prompt has such ids.
        """
        super().validate_token_ids(token_ids, parameter=parameter)
        reserved = self.served.reserved
        twin = self.served.opening[1]
        found = reserved.intersection(token_ids[1:]) | (reserved - {twin}).intersection(token_ids[:1])
        if found:
            raise VLLMValidationError(
                f"Token ids {sorted(found)} are step markers; only the model writes them", parameter=parameter
            )


def guard(tokenizer: Any) -> Any:
    """A copy of a tokenizer whose `apply_chat_template` returns ids and never makes user text a special token."""

    class Guarded(type(tokenizer)):  # type: ignore[misc]
        def apply_chat_template(
            self, conversation: Any, tools: Any = None, tokenize: bool = True, return_dict: bool = False, **given: Any
        ) -> Any:
            # Other template arguments may be user text as well; single words and flags are left as they are.
            texts = {name: value for name, value in given.items() if name != "chat_template" and _may_hold_text(value)}
            fixed = {name: value for name, value in given.items() if name not in texts}

            def render(dialogue: Any, tools: Any) -> str:
                turns, held = dialogue
                text: str = tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, **fixed, **held)
                return text

            return encode_dialogue(tokenizer, [_as_in_training(conversation), texts], tools, render)

        def __reduce__(self) -> Any:  # vLLM copies the tokenizer for each of its threads
            return guard, (copy.deepcopy(tokenizer),)

    guarded = copy.copy(tokenizer)
    guarded.__class__ = Guarded
    return guarded


def _as_in_training(conversation: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with stripped texts; turns that do not alternate are joined if all of them are plain texts."""
    stripped = [
        {**turn, "content": turn["content"].strip()} if isinstance(turn.get("content"), str) else turn
        for turn in conversation
    ]
    plain = all(turn["role"] in _ROLES and isinstance(turn.get("content"), str) for turn in stripped)
    turns = [(turn["role"], turn["content"]) for turn in stripped] if plain else []
    joined = alternating_turns(turns)
    return stripped if joined == turns else [{"role": role, "content": text} for role, text in joined]


def _may_hold_text(value: Any) -> bool:
    """Whether a chat template argument may be more than a single word."""
    return isinstance(value, dict | list) or (isinstance(value, str) and not value.isidentifier())
