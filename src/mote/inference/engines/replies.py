"""What a server sends back: a chat completion, checked as it comes off the wire, and which errors may pass."""

import email.utils
import time

from openai import APIStatusError
from pydantic import BaseModel, Field

OF_ONE_REQUEST = {400, 413, 422}  # of the 4xx: another request may be answered
_MAY_PASS = {408, 409, 425, 429}  # of the 4xx: the same request may be answered later


class Candidate(BaseModel):
    """A token that could have been written, and its log-probability."""

    token: str
    logprob: float


class Position(BaseModel):
    """One written token, with the likeliest ones in its place."""

    top_logprobs: list[Candidate] = []


class Logprobs(BaseModel):
    """Log-probabilities of the written tokens."""

    content: list[Position] | None = None


class Text(BaseModel):
    """The assistant's message."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @property
    def reasons_first(self) -> bool:
        """Whether the model reasoned before its answer."""
        return bool(self.reasoning_content or self.reasoning) or (self.content or "").lstrip().startswith("<think>")


class Choice(BaseModel):
    """One completion."""

    message: Text
    finish_reason: str | None = None
    logprobs: Logprobs | None = None


class Usage(BaseModel):
    """Token counts."""

    completion_tokens: int = 0
    prompt_tokens: int | None = None


class Reply(BaseModel):
    """A chat completion; what is not used here is not checked."""

    choices: list[Choice] = Field(min_length=1)
    usage: Usage | None = None

    @property
    def counted(self) -> Usage:
        """Its token counts; none where the server does not count."""
        return self.usage or Usage()


def may_pass(error: APIStatusError) -> bool:
    """Whether the same request can succeed later: the server is busy or broken, the request is not at fault."""
    return error.status_code >= 500 or error.status_code in _MAY_PASS


def wait_of(error: APIStatusError) -> float | None:
    """Seconds that Retry-After asks for, as a number or as a date; None where there is no such header."""
    header = error.response.headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(header))
    except ValueError:
        parsed = email.utils.parsedate_tz(header)
        return max(0.0, email.utils.mktime_tz(parsed) - time.time()) if parsed else None


def said(error: APIStatusError) -> str:
    """What the server says of an error, on one line."""
    body = error.body
    text = str(body.get("message") or body) if isinstance(body, dict) else error.response.text
    return f"{error.status_code}: {' '.join(text.split())[:200] or error.response.reason_phrase}"
