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
from greenaio._core.counters import COUNTERS

__all__ = ['Collector']

FAMILIES = {'gauge': GaugeMetricFamily, 'counter': CounterMetricFamily}
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
        for counter in COUNTERS:
            yield FAMILIES[counter.kind](f'greenaio_{counter.metric}', counter.help)
        yield _durations()

    def collect(self) -> Iterator[Metric]:
        """Yield each metric as it is now. From any thread; waits for nothing."""
        stats: Any = greenaio.stats()
        for counter in COUNTERS:
            family = FAMILIES[counter.kind]
            yield family(f'greenaio_{counter.metric}', counter.help, getattr(stats, counter.name))
        durations = _durations()
        for labels, latency in stats.latency.items():
            buckets = [(str(bound), float(count)) for bound, count in latency.buckets]
            durations.add_metric(labels, [*buckets, ('+Inf', float(latency.count))], latency.sum)
        yield durations


def _durations() -> HistogramMetricFamily:
    return HistogramMetricFamily(
        DURATION, 'How long requests took, from when they were first offered to the kernel or to a thread.',
        labels=('way', 'direction'))
