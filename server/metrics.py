"""What /metrics tells Prometheus, all of it from the scheduler's own counts."""

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

GAUGES = {  # name: what it is, from Stats
    "requests_running": ("Requests that the engine works on.", lambda s: s.running),
    "requests_waiting": ("Requests in the queue.", lambda s: s.waiting),
    "kv_cache_pages_used": ("Cache pages held by requests.", lambda s: s.pages_used),
    "kv_cache_pages_kept": ("Cache pages that can be found again by their tokens.", lambda s: s.pages_kept),
    "kv_cache_pages": ("Cache pages there are.", lambda s: s.pages_total),
    "kv_cache_usage_ratio": ("Share of the cache pages held by requests.", lambda s: s.pages_used / s.pages_total),
    "engine_step_age_seconds": ("Time since the engine's step began that runs now.", lambda s: s.step_age),
}
COUNTERS = {
    "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", lambda s: s.prefix_queries),
    "prefix_cache_hits": ("Prompt tokens found in the prefix cache.", lambda s: s.prefix_hits),
    "preemptions": ("Requests put back for want of pages.", lambda s: s.preemptions),
    "prompt_tokens": ("Prompt tokens taken in.", lambda s: s.prompt_tokens),
    "generation_tokens": ("Tokens generated.", lambda s: s.generated_tokens),
    "draft_tokens": ("Tokens guessed from the text so far.", lambda s: s.drafted),
    "draft_tokens_accepted": ("Of them, those that came true.", lambda s: s.accepted),
    "engine_steps": ("Steps of the engine.", lambda s: s.steps),
}
HISTOGRAMS = {
    "time_to_first_token_seconds": ("From a request to its first token.", lambda s: s.first_token_seconds),
    "inter_token_latency_seconds": ("Between two tokens of an answer.", lambda s: s.inter_token_seconds),
    "queue_seconds": ("From a request to its turn.", lambda s: s.queue_seconds),
}


class Metrics:
    """A registry of its own: two servers in one process do not share counts."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self.registry = scheduler, CollectorRegistry()
        self.registry.register(self)  # type: ignore[arg-type]

    def collect(self) -> Iterator[Any]:
        stats = self.scheduler.stats()
        for name, (what, value) in GAUGES.items():
            yield GaugeMetricFamily(f"lazulite_{name}", what, value(stats))
        for name, (what, value) in COUNTERS.items():
            yield CounterMetricFamily(f"lazulite_{name}", what, value(stats))
        for name, (what, histogram) in HISTOGRAMS.items():
            h = histogram(stats)
            bounds = [*map(str, h.bounds), "+Inf"]
            rows = list(zip(bounds, map(float, accumulate(h.counts)), strict=True))
            yield HistogramMetricFamily(f"lazulite_{name}", what, rows, h.sum)
        ended = CounterMetricFamily("lazulite_requests", "Answers ended, by reason.", labels=["reason"])
        for reason, count in stats.finished.items():
            ended.add_metric([reason], count)
        yield ended

    def text(self) -> bytes:
        return generate_latest(self.registry)
