"""The bodies of replies, as OpenAI's API has them; `mote` holds what it has no field for."""

from typing import Literal

from pydantic import BaseModel

from mote.core.records import Finish


class Details(BaseModel):
    """Tokens of the steps before the response, markers included."""

    reasoning_tokens: int


class Usage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: Details


class StepTokens(BaseModel):
    """What a whole answer is made of: its mode, and the tokens of each step."""

    mode: str
    steps: dict[str, int]


class CheckTold(BaseModel):
    """The check of the answer at one depth."""

    depth: str
    safe: bool
    score: float | None


class CheckedTokens(StepTokens):
    """Of an answer that checks itself also the last verdict, all checks, and tokens of answers that they dropped."""

    safe: bool
    checks: list[CheckTold]
    dropped: int


class Happening(BaseModel):
    """What a piece of a stream tells: a step begins, its text comes, it ends with so many tokens.

    Where the answer is checked: one is drafted, its check has a verdict, another chain begins.
    """

    event: Literal["begin", "text", "end", "done", "draft", "check", "again"]
    step: str
    answer: bool  # whether it is the step that the user reads
    tokens: int = 0
    verdict: str | None = None
    safe: bool | None = None
    score: float | None = None
    deeper: str | None = None  # the mode of the chain that begins


class Message(BaseModel):
    """A whole answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    reasoning_content: str | None = None
    refusal: None = None


class Choice(BaseModel):
    """One of the answers of a request."""

    index: int
    message: Message
    finish_reason: Finish
    logprobs: None = None
    mote: CheckedTokens | StepTokens


class Completion(BaseModel):
    """The reply to a request that is not streamed."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Piece(BaseModel):
    """What a chunk adds to an answer; only the fields that are given are sent."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None


class ChunkChoice(BaseModel):
    """A piece of one of the answers."""

    index: int
    delta: Piece
    finish_reason: Finish | None
    mote: Happening | CheckedTokens | StepTokens | None = None


class Chunk(BaseModel):
    """An event of a stream."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class Served(BaseModel):
    """A model that is served: the same weights in one of the modes."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["mote"] = "mote"


class ServedList(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[Served]
