"""Parses the body of a chat completion request; a field that would change the answer is never ignored."""

import difflib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mote.core.dialogue import without_thought
from mote.core.errors import UserError, first_line
from mote.core.generation import Limits, Sampling
from mote.core.records import Question
from mote.core.scheme import ADAPTIVE, CHECKED
from mote.inference.inputs import as_question
from mote.serve.api_error import ApiError
from mote.serve.server_settings import ServeSettings

# Fields of OpenAI's API that have no effect on the answer ...
_WITHOUT_EFFECT = {
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
    "service_tier", "store", "user",
}  # fmt: skip
# ... and fields that would, with the values that are no-ops.
_NO_OPS: dict[str, tuple[Any, ...]] = {
    "audio": (), "chat_template_kwargs": ({},), "frequency_penalty": (0,), "function_call": ("none", "auto"),
    "functions": ([],), "logit_bias": ({},), "logprobs": (False,), "min_p": (0,), "modalities": (["text"],),
    "prediction": (), "presence_penalty": (0,), "reasoning_effort": (), "repetition_penalty": (1,),
    "response_format": ({"type": "text"},), "tool_choice": ("none", "auto"), "tools": ([],), "top_k": (-1, 0),
    "top_logprobs": (0,), "verbosity": (), "web_search_options": (),
}  # fmt: skip
_REASONING_PARTS = ("reasoning", "thinking", "redacted_thinking")  # content parts that clients keep reasoning in
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


_Stop = Annotated[str, Field(min_length=1, max_length=200)]


class _Part(BaseModel):
    type: str
    text: str = ""
    refusal: str = ""


class _Turn(BaseModel):
    """A message; its other fields, such as the reasoning of an earlier answer, are ignored."""

    role: str
    reasoning: Any = None
    reasoning_content: Any = None
    reasoning_details: Any = None
    content: Annotated[list[_Part] | None, BeforeValidator(_as_parts)] = None
    tool_calls: list[Any] | None = None


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[_Turn] = Field(min_length=1)
    mode: str | None = None
    max_step_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1, le=8)
    stop: Annotated[list[_Stop] | None, Field(max_length=4), BeforeValidator(_as_list)] = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    include_reasoning: bool = True


@dataclass(frozen=True)
class ChatRequest:
    """A parsed request.

    Attributes:
        model: Model name as the request gave it.
        question: The dialogue.
        mode: Mode to answer in.
        limits: Token budgets.
        bounded: Whether the request set a total budget (`max_tokens`).
        sampling: Of the first answer; the i-th after it uses `seed + i`.
        n: Number of answers.
        stop: Strings that end a response.
        stream: Whether to stream the answer.
        include_usage: Whether a stream ends with the token counts.
        include_reasoning: Whether to send the steps before the response.
    """

    model: str
    question: Question
    mode: str
    limits: Limits
    bounded: bool
    sampling: Sampling
    n: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    include_reasoning: bool


def parse_request(data: bytes, settings: ServeSettings, modes: Sequence[str]) -> ChatRequest:
    """Parse and validate the body of a request.

    Args:
        data: The body.
        settings: Settings of the server.
        modes: Modes of the model.

    Raises:
        ApiError: It is not JSON or a field has a wrong type or value (400), a field asks for something unsupported
            (422), another model is named (404), or the messages are too long (413).
    """
    try:
        body = _Body.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"]) or None
        raise ApiError(400, f"the request is not valid: {first_line(error)}", param) from error
    _check_extra(body.model_extra or {})
    question = _question(body.messages, settings.max_request_chars)
    max_tokens = _max_tokens(body, settings.max_tokens)
    answers = settings.answers
    # Without max_step_tokens, max_tokens is the budget of each step as well.
    max_step_tokens = body.max_step_tokens or max_tokens or answers.max_step_tokens
    return ChatRequest(
        model=body.model,
        question=question,
        mode=_mode(body, settings.name, modes),
        limits=Limits(min(max_step_tokens, settings.max_tokens), max_tokens),
        bounded=max_tokens is not None,
        sampling=Sampling(
            answers.temperature if body.temperature is None else body.temperature,
            answers.top_p if body.top_p is None else body.top_p,
            secrets.randbelow(2**62) if body.seed is None else body.seed,
        ),
        n=body.n or 1,
        stop=tuple(body.stop or ()),
        stream=bool(body.stream),
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        include_reasoning=body.include_reasoning,
    )


def _check_extra(extra: dict[str, Any]) -> None:
    for name, value in extra.items():
        if value is None or name in _WITHOUT_EFFECT or value in _NO_OPS.get(name, ()):
            continue
        if name in _NO_OPS:
            raise ApiError(422, f"{name}: this server does not support it; leave it out", name, "unsupported")
        near = difflib.get_close_matches(name, [*_Body.model_fields, *_NO_OPS, *_WITHOUT_EFFECT], 1)
        hint = f"did you mean '{near[0]}'?" if near else "leave it out"
        raise ApiError(400, f"{name[:80]}: unknown field; {hint}", name[:80], "unknown_field")


def _question(turns: list[_Turn], max_chars: int) -> Question:
    messages = []
    for index, turn in enumerate(turns):
        where = f"messages.{index}"
        if turn.role not in _ROLES or turn.tool_calls:
            raise ApiError(
                422,
                f"{where}: a message of role '{turn.role[:40]}'{' with tool calls' if turn.tool_calls else ''} is not "
                f"supported; use one of {sorted(_ROLES)} with text",
                where,
                "unsupported",
            )
        messages.append({"role": _ROLES[turn.role], "content": _text(turn, where)})
    chars = sum(len(message["content"]) for message in messages)
    if chars > max_chars:
        raise ApiError(
            413, f"messages: {chars} characters, more than the {max_chars} that this server accepts", "messages"
        )
    try:
        return as_question(messages)
    except UserError as error:
        raise ApiError(400, "messages: the last message must be the user's", "messages") from error


def _text(turn: _Turn, where: str) -> str:
    """The text of a message; for an earlier answer without its reasoning, as our own history keeps it."""
    answer = turn.role == "assistant"
    parts = [part for part in turn.content or [] if not (answer and part.type in _REASONING_PARTS)]
    for part in parts:
        if part.type != "text" and not (answer and part.type == "refusal"):
            raise ApiError(422, f"{where}.content: only text is supported, not '{part.type[:40]}'", f"{where}.content")
    text = "".join(part.refusal if part.type == "refusal" else part.text for part in parts)
    if not answer:
        return text
    # Some clients send reasoning back as a thought before the answer instead of in its own field.
    own_field = turn.reasoning or turn.reasoning_content or turn.reasoning_details
    if not own_field and len(parts) == len(turn.content or []):
        text = without_thought(text)
    return text.strip()


def _max_tokens(body: _Body, limit: int) -> int | None:
    """The total budget that a request sets."""
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise ApiError(400, "max_tokens: differs from max_completion_tokens; give one of them", "max_tokens")
    given = body.max_completion_tokens or body.max_tokens
    if given is not None and given > limit:
        raise ApiError(400, f"max_tokens: {given} is more than the {limit} that this server generates", "max_tokens")
    return given


def _mode(body: _Body, name: str, modes: Sequence[str]) -> str:
    mode = body.model.partition(":")[2]
    if CHECKED not in modes and CHECKED in (mode, body.mode):
        raise ApiError(
            400,
            f"mode: '{CHECKED}' needs an adapter with a trained check (train.method=four-experts); use one of "
            f"{list(modes)}",
            "mode",
        )
    known = [name, *(f"{name}:{mode}" for mode in modes)]
    if body.model not in known:
        raise ApiError(
            404, f"model: '{body.model[:80]}' is not served here; use one of {known}", "model", "model_not_found"
        )
    if body.mode is None:
        return mode or ADAPTIVE
    if body.mode not in modes:
        raise ApiError(400, f"mode: '{body.mode[:40]}' is not a mode; use one of {list(modes)}", "mode")
    if mode and mode != body.mode:
        raise ApiError(400, f"mode: '{body.mode}' contradicts the model's name '{body.model}'; leave one out", "mode")
    return body.mode
