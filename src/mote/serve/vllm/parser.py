"""An answer's ids -> reasoning and content: what is inside which markers decides, never what the text says.

vLLM's own readers look at text, in which a model can spell a marker. Ids cannot be forged.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.exceptions import VLLMValidationError
from vllm.parser.abstract_parser import Parser
from vllm.parser.parser_manager import ParserManager
from vllm.reasoning.abs_reasoning_parsers import ReasoningParser

from mote.core.scheme import BASE
from mote.inference.events import Events
from mote.serve.answer_stream import AnswerStream
from mote.serve.vllm.folder_config import ONLY_IN_THE_TEMPLATE, OWN_GRAMMAR, Served


class StepReasoning(ReasoningParser):
    """What vLLM's engine asks of a reasoning parser; the reading of answers is `StepParser`'s."""

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Only asked for structured outputs, which are refused."""
        return False

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        """Likewise."""
        return input_ids

    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        """Never called: text is not looked at."""
        raise NotImplementedError

    def extract_reasoning_streaming(self, *args: Any) -> DeltaMessage | None:
        """Never called either."""
        raise NotImplementedError


class StepParser(Parser):
    """Reads an answer, whole or as it comes, as `mote serve` does."""

    reasoning_parser_cls = StepReasoning

    def __init__(self, tokenizer: Any, tools: Any = None, *args: Any, model_config: Any = None, **kwargs: Any) -> None:
        super().__init__(tokenizer, tools, *args, model_config=model_config, **kwargs)
        self.asked = (kwargs.get("chat_template_kwargs") or {}).get("mode")
        # vLLM makes one without a configuration, to see whether that works.
        self.served = Served.model_validate(model_config.hf_config.mote) if model_config else None
        self.stream: AnswerStream | None = None

    def adjust_request(self, request: Any) -> Any:
        """Give mode and budget to the grammar, from wherever a request may name them.

        They are the chat template's `mode`, the fields `mode` and `max_step_tokens` that `mote serve` knows, and the
        model's name (`name:mode`).

        Raises:
            VLLMValidationError: The request has a grammar of its own, or asks for the base model too late.
        """
        assert self.served is not None
        given = getattr(request, "response_format", None)
        if getattr(request, "structured_outputs", None) or (given is not None and given.type != "text"):
            raise VLLMValidationError(OWN_GRAMMAR.format("structured_outputs"))
        fields = request.model_extra or {}
        _, named, mode = str(request.model or "").rpartition(":")
        asked = {name: fields[name] for name in ("mode", "max_step_tokens") if name in fields}
        if named and mode in (*self.served.modes, BASE):
            asked.setdefault("mode", mode)
        if asked.get("mode") == BASE != self.asked:
            raise VLLMValidationError(ONLY_IN_THE_TEMPLATE)
        if self.asked is not None:
            asked["mode"] = self.asked
        asked.setdefault("mode", self.served.mode)
        if asked["mode"] == BASE:  # the prompt says so
            del asked["mode"]
        request.vllm_xargs = {**asked, **(request.vllm_xargs or {})}
        return request

    def is_reasoning_end(self, input_ids: list[int]) -> bool:
        """A prompt holds no step."""
        return False

    def parse(
        self,
        model_output: str,
        request: Any,
        enable_auto_tools: bool = False,
        model_output_token_ids: Sequence[int] = (),
    ) -> tuple[str | None, str | None, list[Any] | None]:
        """Reasoning, content and no tool calls of a whole answer."""
        reasoning, content = self._read(model_output_token_ids, request, final=True)
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
        """What new tokens add to the answer."""
        reasoning, content = self._read(delta_token_ids, request, finished)
        if not reasoning and not content:
            return None
        return DeltaMessage(reasoning=reasoning or None, content=content or None)

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """Tokens of the steps before the answer, their markers included."""
        assert self.served is not None
        if not self.served.reserved.intersection(token_ids):
            return 0
        start, _ = self.served.markers[self.served.answer]
        return next((i for i, id_ in enumerate(token_ids) if id_ == start), len(token_ids))

    def _read(self, ids: Iterable[int], request: Any, final: bool) -> tuple[str, str]:
        """What new ids add to reasoning and to content."""
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


def compose_step_parser() -> None:
    """Let vLLM take `StepParser` for the reasoning parser `mote`, where it would wrap a reader of text.

    vLLM has no registry for this; the one place where it puts its readers together is wrapped.
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
