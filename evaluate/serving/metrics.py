"""What a server has done, in the format of Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from evaluate.serving.worker import Worker

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server."""

    def __init__(self, worker: Worker) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "paravt_requests", "Requests by status of their answer.", ["status"], registry=registry
        )
        self.prompt_tokens = Counter(
            "paravt_prompt_tokens", "Tokens of prompts.", registry=registry
        )
        self.completion_tokens = Counter(
            "paravt_completion_tokens", "Tokens of completions that were told.", registry=registry
        )
        self.gone = Counter(
            "paravt_clients_gone", "Clients that went away before an answer.", registry=registry
        )
        self.seconds = Histogram(
            "paravt_request_seconds", "Seconds of a request.", buckets=SECONDS, registry=registry
        )
        self.first = Histogram(
            "paravt_first_token_seconds",
            "Seconds until the first piece of a stream.",
            buckets=SECONDS,
            registry=registry,
        )
        self.open = Gauge("paravt_requests_open", "Requests in the server.", registry=registry)

        def told(name: str, words: str, attribute: str) -> None:
            gauge = Gauge(name, words, registry=registry)
            gauge.set_function(lambda: getattr(worker, attribute))

        told("paravt_rows_busy", "Streams that generate or wait for a row.", "busy")
        told("paravt_engine_steps", "Steps of the engine.", "steps")
        told("paravt_engine_tokens", "Tokens that the engine drew.", "tokens")
        told("paravt_engine_seconds", "Seconds of the engine's steps.", "seconds")

    @property
    def mean_seconds(self) -> float:
        """Of a request so far; 1 before the first."""
        samples = {s.name: s.value for m in self.seconds.collect() for s in m.samples}
        count = samples.get("paravt_request_seconds_count", 0)
        return samples["paravt_request_seconds_sum"] / count if count else 1.0

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self._registry)
