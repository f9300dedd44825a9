"""Prometheus metrics of one server, for each expert."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_MILLISECONDS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 1)
_PROBABILITY = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)


class Metrics:
    """`model` is the name that answered; a request over several experts counts for each of them."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "gradientspace_requests", "Requests, by who answered, why and HTTP status.",
            ["model", "reason", "status"], registry=registry,
        )  # fmt: skip
        self.rejected = Counter(
            "gradientspace_rejected", "Requests refused before anyone answered.", ["status"], registry=registry
        )
        self.tokens = Counter("gradientspace_tokens", "Tokens read and written.", ["model", "kind"], registry=registry)
        self.seconds = Histogram(
            "gradientspace_request_seconds", "From request to last byte.", ["model"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "gradientspace_first_token_seconds", "From request to first token, streams only.", ["model"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.routing = Histogram(
            "gradientspace_routing_seconds", "Choosing the expert.", buckets=_MILLISECONDS, registry=registry
        )
        self.probability = Histogram(
            "gradientspace_routing_probability", "The router's probability of its choice.", ["model"],
            buckets=_PROBABILITY, registry=registry,
        )  # fmt: skip
        self.fallbacks = Counter(
            "gradientspace_fallbacks", "Prompts the router was too unsure of.", ["model"], registry=registry
        )
        self.running = Gauge("gradientspace_running", "Requests accepted and not finished.", registry=registry)
        self.queue = Gauge("gradientspace_queue", "Requests that wait for the engine.", registry=registry)

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)
