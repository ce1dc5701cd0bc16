"""Settings of `mote serve`."""

from dataclasses import dataclass, field

from mote.core.recipe import AnswerSettings

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServeSettings:
    """Settings of a server.

    Attributes:
        name: Model name in requests; `name:mode` selects a mode.
        host: Address to listen on.
        port: Port to listen on; 0 picks a free one.
        api_key: Bearer token that requests must send; None to require none.
        max_running: Answers generated concurrently.
        max_waiting: Answers queued beyond those; further requests get status 429.
        max_request_chars: Characters of all messages of a request together.
        max_tokens: Tokens of any one answer, markers included.
        timeout: Seconds that a request may take, time in the queue included.
        grace: Seconds that answers in flight get to finish when the server is stopped.
        answers: Defaults for requests.
    """

    name: str = "mote"
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    max_running: int = 16
    max_waiting: int = 64
    max_request_chars: int = 100_000
    max_tokens: int = 4096
    timeout: float = 600.0
    grace: float = 30.0
    answers: AnswerSettings = field(default_factory=AnswerSettings)

    @property
    def local(self) -> bool:
        """Whether the server is reachable from this machine only."""
        return self.host in LOOPBACK

    @property
    def max_request_bytes(self) -> int:
        """Size limit of a request body; a text within `max_request_chars` fits even if JSON escapes all of it."""
        return 6 * self.max_request_chars + (1 << 16)
