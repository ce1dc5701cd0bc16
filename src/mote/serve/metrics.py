"""Prometheus metrics of the server."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from mote.inference.batch_loop import BatchLoop

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Metrics of one server, in their own registry.

    Args:
        batcher: Its rows and computed tokens are read when the metrics are scraped.
    """

    def __init__(self, batcher: BatchLoop) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter("mote_requests", "Requests by final status", ["mode", "status"], registry=registry)
        self.prompt_tokens = Counter("mote_prompt_tokens", "Prompt tokens", registry=registry)
        self.tokens = Counter("mote_tokens", "Generated tokens, markers included", ["mode", "step"], registry=registry)
        self.first_token = Histogram(
            "mote_first_token_seconds", "Seconds to the first token", registry=registry, buckets=_SECONDS
        )
        self.seconds = Histogram("mote_request_seconds", "Seconds per request", registry=registry, buckets=_SECONDS)
        running = Gauge("mote_rows_running", "Answers in the running batch", registry=registry)
        running.set_function(lambda: batcher.rows[0])
        waiting = Gauge("mote_rows_waiting", "Answers waiting for a slot in the batch", registry=registry)
        waiting.set_function(lambda: batcher.rows[1])
        computed = Gauge("mote_tokens_computed", "Tokens computed by forward passes", registry=registry)
        computed.set_function(lambda: batcher.tokens_computed)
