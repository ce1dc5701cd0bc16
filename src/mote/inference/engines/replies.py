"""Server responses: validated chat completions, and which errors are transient."""

import email.utils
import time

from openai import APIStatusError
from pydantic import BaseModel, Field

REQUEST_ERRORS = {400, 413, 422}  # of the 4xx: the request is at fault, another one may succeed
_TRANSIENT = {408, 409, 425, 429}  # of the 4xx: the same request may succeed later


class Candidate(BaseModel):
    """A candidate token and its log-probability."""

    token: str
    logprob: float


class Position(BaseModel):
    """The most likely tokens at one position."""

    top_logprobs: list[Candidate] = []


class Logprobs(BaseModel):
    """Log-probabilities of the generated tokens."""

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
    """A chat completion; unused fields are not validated."""

    choices: list[Choice] = Field(min_length=1)
    usage: Usage | None = None

    @property
    def counted(self) -> Usage:
        """Token counts; zero or None if the server reports none."""
        return self.usage or Usage()


def is_transient(error: APIStatusError) -> bool:
    """Whether the same request can succeed later: the server is busy or broken."""
    return error.status_code >= 500 or error.status_code in _TRANSIENT


def is_loading(error: APIStatusError) -> bool:
    """Whether the server is up and still loads its model; llama.cpp answers 503 with `Loading model`."""
    return error.status_code == 503 and "loading" in error_text(error).lower()


def retry_after(error: APIStatusError) -> float | None:
    """Seconds from Retry-After, given as a number or a date; None without that header."""
    header = error.response.headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(header))
    except ValueError:
        parsed = email.utils.parsedate_tz(header)
        return max(0.0, email.utils.mktime_tz(parsed) - time.time()) if parsed else None


def error_text(error: APIStatusError) -> str:
    """The server's error message on one line."""
    body = error.body
    text = str(body.get("message") or body) if isinstance(body, dict) else error.response.text
    return f"{error.status_code}: {' '.join(text.split())[:200] or error.response.reason_phrase}"
