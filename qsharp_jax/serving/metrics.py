"""Numbers for Prometheus, the text of /metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from qsharp_jax.serving.engine import Engine
from qsharp_jax.serving.requests import Update

SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        load = {
            "qsharp_queue_length": ("requests that wait for rows", lambda: engine.load.queued),
            "qsharp_rows": ("rows of the decode loop", lambda: engine.load.rows),
            "qsharp_rows_in_use": ("rows that answer a request", lambda: engine.load.rows_in_use),
        }
        for name, (words, read) in load.items():
            Gauge(name, words, registry=self.registry).set_function(read)
        words = "requests by path and HTTP status"
        self.requests = Counter("qsharp_requests", words, ["path", "status"], registry=self.registry)
        self.prompt_tokens = Counter("qsharp_prompt_tokens", "tokens of prompts", registry=self.registry)
        words = "tokens of responses, guided or not; their rate is the tokens per second"
        self.tokens = Counter("qsharp_tokens", words, ["guided"], registry=self.registry)
        words = "KL of the guided policy to the reference, summed over tokens, in nats"
        self.kl = Counter("qsharp_kl_nats", words, registry=self.registry)
        self.first_token = Histogram(
            "qsharp_time_to_first_token_seconds", "from a request to its first token", buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "qsharp_request_seconds", "from a request to the end of its answer", buckets=SECONDS, registry=self.registry
        )

    def count(self, update: Update) -> None:
        guided = update.request.is_guided
        self.tokens.labels(str(guided).lower()).inc(len(update.tokens))
        self.kl.inc(max(sum(update.kl), 0.0))

    def text(self) -> bytes:
        return generate_latest(self.registry)
