"""Response bodies of OpenAI's API; the extra field `mote` holds what OpenAI's API has no field for."""

from typing import Literal

from pydantic import BaseModel

from mote.core.records import Finish


class Details(BaseModel):
    """Tokens of the reasoning steps, markers included."""

    reasoning_tokens: int


class Usage(BaseModel):
    """Prompt tokens and generated tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: Details


class StepTokens(BaseModel):
    """Mode of a finished answer and its token count per step."""

    mode: str
    steps: dict[str, int]


class CheckResult(BaseModel):
    """Verdict of the trained check on the answer at one depth."""

    depth: str
    safe: bool
    score: float | None


class CheckedTokens(StepTokens):
    """The same for a self-checked answer: the last verdict, all checks, and the tokens of dropped attempts."""

    safe: bool
    checks: list[CheckResult]
    dropped: int


class StepEvent(BaseModel):
    """What a chunk reports: a step begins, its text arrives, it ends with `tokens` tokens.

    With self-check: an answer is drafted, the check returns a verdict, a deeper chain begins.
    """

    event: Literal["begin", "text", "end", "done", "draft", "check", "again"]
    step: str
    answer: bool  # whether this is the step that the user reads
    tokens: int = 0
    verdict: str | None = None
    safe: bool | None = None
    score: float | None = None
    deeper: str | None = None  # mode of the chain that begins


class Message(BaseModel):
    """A complete answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    reasoning_content: str | None = None
    refusal: None = None


class Choice(BaseModel):
    """One of the answers to a request."""

    index: int
    message: Message
    finish_reason: Finish
    logprobs: None = None
    mote: CheckedTokens | StepTokens


class Completion(BaseModel):
    """Response body of a request without streaming."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Delta(BaseModel):
    """Text that a chunk adds to an answer; only fields that are set are sent."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None


class ChunkChoice(BaseModel):
    """What a chunk adds to one of the answers."""

    index: int
    delta: Delta
    finish_reason: Finish | None = None
    mote: StepEvent | CheckedTokens | StepTokens | None = None


class Chunk(BaseModel):
    """One server-sent event of a stream."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class ModelEntry(BaseModel):
    """A model name of `/v1/models`: the same weights in one of the modes."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["mote"] = "mote"


class ModelList(BaseModel):
    """Response body of `/v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]
