"""Export `greenaio.stats` to Prometheus.

``greenaio.prometheus.Collector()`` once at the start, and prometheus_client exposes greenaio's
metrics, too. They are of this process: of several workers each has its own.
``pip install 'greenaio[metrics]'`` brings prometheus_client.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import REGISTRY, CollectorRegistry
from prometheus_client.registry import Collector as _Collector

import greenaio

__all__ = ['Collector']

# Fields of `greenaio.stats()`: what they are called here, and what they are.
GAUGES = {
    'hubs': ('greenaio_hubs', 'Hubs that do I/O.'),
    'in_flight': ('greenaio_requests_in_flight', 'Requests that the kernel has.'),
    'pending': ('greenaio_requests_pending', 'Requests that wait for a batch, or for room in the queues.'),
    'with_threads': ('greenaio_requests_with_threads', 'System calls that threads have or are to have.'),
    'blocked': ('greenaio_hubs_blocked', 'Hubs whose native AIO context is full.'),
    'waiting': ('greenaio_greenlets_waiting', 'Greenlets that wait for a request.'),
}
COUNTERS = {
    'submitted': ('greenaio_requests_submitted', 'Requests that the kernel took.'),
    'completed': ('greenaio_requests_completed', 'Requests that the kernel has answered.'),
    'batches': ('greenaio_batches_submitted', 'Calls of io_submit that took any.'),
    'in_line': ('greenaio_operations_in_line', 'Operations that were over at once: cached, or in memory.'),
    'by_thread': ('greenaio_requests_by_thread', 'System calls that threads made.'),
    'abandoned': ('greenaio_requests_abandoned', 'Requests whose greenlet was killed or timed out.'),
    'slow_submits': ('greenaio_slow_submits', 'Calls of io_submit that held their hub.'),
    'demoted': ('greenaio_files_demoted', 'Files that were sent to threads for a while because of that.'),
}
DURATION = 'greenaio_request_duration_seconds'


class Collector(_Collector):
    """Collects greenaio's gauges, counters and latency histograms, in seconds, at each scrape.

    It enters itself into *registry*, by default prometheus_client's own; None enters it nowhere.
    Raises ValueError if there is one already.
    """

    def __init__(self, registry: CollectorRegistry | None = REGISTRY) -> None:
        if registry is not None:
            registry.register(self)

    def describe(self) -> Iterator[Metric]:
        """Yield each metric without a value; for the registry, which wants to know their names."""
        for name, text in GAUGES.values():
            yield GaugeMetricFamily(name, text)
        for name, text in COUNTERS.values():
            yield CounterMetricFamily(name, text)
        yield _durations()

    def collect(self) -> Iterator[Metric]:
        """Yield each metric as it is now. From any thread; waits for nothing."""
        stats: Any = greenaio.stats()
        for field, (name, text) in GAUGES.items():
            yield GaugeMetricFamily(name, text, getattr(stats, field))
        for field, (name, text) in COUNTERS.items():
            yield CounterMetricFamily(name, text, getattr(stats, field))
        durations = _durations()
        for labels, latency in stats.latency.items():
            buckets = [(str(bound), float(count)) for bound, count in latency.buckets]
            durations.add_metric(labels, [*buckets, ('+Inf', float(latency.count))], latency.sum)
        yield durations


def _durations() -> HistogramMetricFamily:
    return HistogramMetricFamily(
        DURATION, 'How long requests took, from when they were first offered to the kernel or to a thread.',
        labels=('way', 'direction'))
