"""What a server counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from mote.inference.batching import Batcher

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of one server, in a registry of its own.

    Args:
        batcher: Its rows and computed tokens are read when somebody asks.
    """

    def __init__(self, batcher: Batcher) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter(
            "mote_requests",
            "Requests for answers, by the status they ended with",
            ["mode", "status"],
            registry=registry,
        )
        self.prompt_tokens = Counter("mote_prompt_tokens", "Tokens of prompts", registry=registry)
        self.tokens = Counter("mote_tokens", "Tokens written, markers included", ["mode", "step"], registry=registry)
        self.first_token = Histogram(
            "mote_first_token_seconds", "Seconds to the first token", registry=registry, buckets=_SECONDS
        )
        self.seconds = Histogram(
            "mote_request_seconds", "Seconds of a whole request", registry=registry, buckets=_SECONDS
        )
        running = Gauge("mote_rows_running", "Answers in the running batch", registry=registry)
        running.set_function(lambda: batcher.rows[0])
        waiting = Gauge("mote_rows_waiting", "Answers that wait for a place in the batch", registry=registry)
        waiting.set_function(lambda: batcher.rows[1])
        computed = Gauge("mote_tokens_computed", "Tokens that went through the model", registry=registry)
        computed.set_function(lambda: batcher.tokens_computed)
