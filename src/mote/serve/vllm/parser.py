"""Splits an answer's token ids into reasoning and content by its markers, never by its text.

vLLM's own parsers look at text, in which a model can spell out a marker; marker ids cannot be forged.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from typing_extensions import override
from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.exceptions import VLLMValidationError
from vllm.parser.abstract_parser import Parser
from vllm.parser.parser_manager import ParserManager
from vllm.reasoning.abs_reasoning_parsers import ReasoningParser

from mote.core.scheme import BASE
from mote.inference.events import Events
from mote.serve.answer_stream import AnswerStream
from mote.serve.vllm.folder_config import BASE_MODE_LATE, GRAMMAR_CONFLICT, ServedConfig


class StepReasoning(ReasoningParser):
    """The reasoning parser that vLLM's engine requires; `StepParser` parses the answers."""

    # The first two are called for structured outputs only, which are refused; the others never, since they take text.

    @override
    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        return False

    @override
    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        return input_ids

    @override
    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        raise NotImplementedError

    @override
    def extract_reasoning_streaming(self, *args: Any) -> DeltaMessage | None:
        raise NotImplementedError


class StepParser(Parser):
    """Parses an answer, whole or streamed, as `mote serve` does."""

    reasoning_parser_cls = StepReasoning

    def __init__(self, tokenizer: Any, tools: Any = None, *args: Any, model_config: Any = None, **kwargs: Any) -> None:
        super().__init__(tokenizer, tools, *args, model_config=model_config, **kwargs)
        self.template_mode = (kwargs.get("chat_template_kwargs") or {}).get("mode")
        # vLLM constructs one without a configuration as a check.
        self.served = ServedConfig.model_validate(model_config.hf_config.mote) if model_config else None
        self.stream: AnswerStream | None = None

    def adjust_request(self, request: Any) -> Any:
        """Pass the mode and the step budget to the grammar, from wherever the request names them.

        These are the chat template's argument `mode`, the fields `mode` and `max_step_tokens` of `mote serve`, and the
        model name (`name:mode`).

        Raises:
            VLLMValidationError: The request has its own grammar, or asks for mode `base` outside the chat template.
        """
        assert self.served is not None
        format_ = getattr(request, "response_format", None)
        if getattr(request, "structured_outputs", None) or (format_ is not None and format_.type != "text"):
            raise VLLMValidationError(GRAMMAR_CONFLICT.format("structured_outputs"))
        fields = request.model_extra or {}
        _, named, mode = str(request.model or "").rpartition(":")
        chosen = {name: fields[name] for name in ("mode", "max_step_tokens") if name in fields}
        if named and mode in (*self.served.modes, BASE):
            chosen.setdefault("mode", mode)
        if chosen.get("mode") == BASE != self.template_mode:
            raise VLLMValidationError(BASE_MODE_LATE)
        if self.template_mode is not None:
            chosen["mode"] = self.template_mode
        chosen.setdefault("mode", self.served.mode)
        if chosen["mode"] == BASE:  # the prompt already says so
            del chosen["mode"]
        request.vllm_xargs = {**chosen, **(request.vllm_xargs or {})}
        return request

    @override
    def is_reasoning_end(self, input_ids: list[int]) -> bool:
        return False  # a prompt contains no step

    def parse(
        self,
        model_output: str,
        request: Any,
        enable_auto_tools: bool = False,
        model_output_token_ids: Sequence[int] = (),
    ) -> tuple[str | None, str | None, list[Any] | None]:
        """Reasoning and content of a whole answer; no tool calls."""
        reasoning, content = self._split(model_output_token_ids, request, final=True)
        return reasoning or None, content, None

    def parse_delta(
        self,
        delta_text: str,
        delta_token_ids: list[int],
        request: Any,
        prompt_token_ids: list[int] | None = None,
        *,
        finished: bool,
    ) -> DeltaMessage | None:
        """Reasoning and content that new tokens add to the answer."""
        reasoning, content = self._split(delta_token_ids, request, finished)
        if not reasoning and not content:
            return None
        return DeltaMessage(reasoning=reasoning or None, content=content or None)

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """Number of tokens of the steps before the answer, markers included."""
        assert self.served is not None
        if not self.served.reserved.intersection(token_ids):
            return 0
        start, _ = self.served.markers[self.served.answer]
        return next((i for i, id_ in enumerate(token_ids) if id_ == start), len(token_ids))

    def _split(self, ids: Iterable[int], request: Any, final: bool) -> tuple[str, str]:
        """Reasoning and content that new token ids add."""
        if self.stream is None:
            assert self.served is not None
            events = Events(self.model_tokenizer, self.served.routing, self.served.experts, self.served.answer)
            stop = request.stop if isinstance(request.stop, list) else [request.stop] if request.stop else []
            self.stream = AnswerStream(events, self.served.answer, stop)
        deltas = [choice.delta for id_ in ids for choice in self.stream.token(id_)]
        if final:
            deltas += [choice.delta for choice in self.stream.end()]
        reasoning = "".join(delta.reasoning_content or "" for delta in deltas) if request.include_reasoning else ""
        return reasoning, "".join(delta.content or "" for delta in deltas)


def use_step_parser() -> None:
    """Make vLLM use `StepParser` for the reasoning parser `mote` instead of wrapping a text parser.

    vLLM has no registry for this, so the one method that composes its parsers is patched.
    """
    manager: Any = ParserManager
    compose = manager._compose_parser
    if getattr(compose, "of_mote", False):
        return

    def composed(cls: Any, /, *, reasoning_parser_name: str | None, **given: Any) -> Any:
        if reasoning_parser_name != "mote":
            return compose(reasoning_parser_name=reasoning_parser_name, **given)
        if given.get("tool_parser_name"):
            raise TypeError("mote: --tool-call-parser is not supported with step experts; leave it out")
        return StepParser

    composed.of_mote = True  # type: ignore[attr-defined]
    manager._compose_parser = classmethod(composed)
