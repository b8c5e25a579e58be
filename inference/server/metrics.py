"""Numbers for Prometheus, with the names that vLLM has for them."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from inference.engine import Engine

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)


class EngineCollector(Collector):
    """Asks the engine for its own numbers whenever somebody reads the metrics."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        """The engine's gauges and totals."""
        stats = self.engine.stats()
        yield GaugeMetricFamily("minimind_num_requests_running", "Answers that are being made", stats.running)
        yield GaugeMetricFamily("minimind_num_requests_waiting", "Requests in the queue", stats.waiting)
        yield CounterMetricFamily("minimind_prompt_tokens", "Tokens of prompts", stats.prompt_tokens)
        yield CounterMetricFamily("minimind_prompt_tokens_cached", "Of these, not read again", stats.reused_tokens)
        yield CounterMetricFamily("minimind_generation_tokens", "Tokens of answers", stats.generated_tokens)
        finished = CounterMetricFamily(
            "minimind_request_success", "Answers that are over, by reason", labels=["finished_reason"]
        )
        for reason, count in stats.finished.items():
            finished.add_metric([reason], count)
        yield finished


class Metrics:
    """What the server measures itself. Every server has its own registry, so two of them share no numbers."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine))
        self.first_token = self._seconds("time_to_first_token_seconds", "From the request to its first token")
        self.between_tokens = self._seconds("inter_token_latency_seconds", "From a token of an answer to the next")
        self.whole = self._seconds("e2e_request_latency_seconds", "From the request to the end of the answer")
        self.rejected = Counter(
            "minimind_admission_rejections", "Requests that got no answer", ["reason"], registry=self.registry
        )

    def _seconds(self, name: str, what: str) -> Histogram:
        return Histogram(f"minimind_{name}", what, buckets=SECONDS, registry=self.registry)
