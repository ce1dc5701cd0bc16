"""What a server may be told."""

from dataclasses import dataclass, field

from mote.core.recipe import AnswerSettings

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServeSettings:
    """Settings of a server.

    Attributes:
        name: Name of the model, as requests give it; `name:mode` is a mode of it.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        api_key: What requests must bring as a bearer token; None for nothing.
        max_running: Answers that are written at once.
        max_waiting: Answers that may wait for their turn; more are refused with 429.
        max_request_chars: Characters of all messages of a request together.
        max_tokens: Tokens that any one answer may have, markers included.
        timeout: Seconds that a request may take, waiting included.
        grace: Seconds that answers in the making get when the server is stopped.
        answers: What a request that does not say otherwise gets.
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
        """Whether only this machine can reach the server."""
        return self.host in LOOPBACK

    @property
    def max_request_bytes(self) -> int:
        """Bytes that a request may have: any text within its limit fits, whether JSON escapes it or not."""
        return 6 * self.max_request_chars + (1 << 16)
