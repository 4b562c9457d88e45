"""The daemon's Prometheus metrics: every name in one table, every label of bounded cardinality."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class MetricSpec:
    """One metric as the docs name it."""

    name: str
    kind: Literal["counter", "histogram", "gauge"]
    labels: tuple[str, ...]
    meaning: str


METRICS: Final[dict[str, MetricSpec]] = {
    spec.name: spec
    for spec in (
        MetricSpec(
            "forebay_rpc_calls_total",
            "counter",
            ("method", "status"),
            "Finished gRPC calls by method and status code name.",
        ),
        MetricSpec(
            "forebay_rpc_seconds",
            "histogram",
            ("method",),
            "Seconds that a unary gRPC call took in the daemon.",
        ),
        MetricSpec(
            "forebay_rpc_internal_errors_total",
            "counter",
            ("method",),
            "Calls that ended with an error nobody expected; each has a log line with its id.",
        ),
        MetricSpec(
            "forebay_tier_bytes",
            "gauge",
            ("tier", "kind"),
            "Bytes of a tier: limit, used, free, dirty, open or reserved.",
        ),
        MetricSpec("forebay_tier_files", "gauge", ("tier",), "Files of a tier."),
        MetricSpec(
            "forebay_tier_seconds",
            "histogram",
            ("tier", "operation"),
            "Seconds that a call on a tier took: its create, write, publish, read (opening a "
            "file), read_into, head, delete, list and the like.",
        ),
        MetricSpec(
            "forebay_tier_moved_bytes_total",
            "counter",
            ("tier", "operation"),
            "Bytes that calls on a tier were to move (write, read_into); what clients map or have "
            "sent by the kernel is not among them.",
        ),
        MetricSpec(
            "forebay_tier_errors_total",
            "counter",
            ("tier", "operation"),
            "Calls on a tier that ended with an error.",
        ),
        MetricSpec(
            "forebay_tier_healthy", "gauge", ("tier",), "1 while the tier answers, 0 if it fails."
        ),
        MetricSpec(
            "forebay_quarantined_replicas",
            "gauge",
            ("tier",),
            "Replicas found damaged or missing: out of service, kept for inspection.",
        ),
        MetricSpec(
            "forebay_scrubbed_bytes",
            "gauge",
            ("tier",),
            "Bytes of blobs that scrubs have read since the start.",
        ),
        MetricSpec(
            "forebay_scrub_damaged_replicas",
            "gauge",
            ("tier",),
            "Replicas that scrubs have found damaged or missing since the start.",
        ),
        MetricSpec(
            "forebay_repairs",
            "gauge",
            ("result",),
            "Blobs whose quarantined replicas were replaced (repaired) or had no good one (failed) "
            "since the start.",
        ),
        MetricSpec("forebay_datasets", "gauge", (), "Datasets in the catalog."),
        MetricSpec("forebay_runs", "gauge", (), "Training runs in the catalog."),
        MetricSpec("forebay_clients", "gauge", (), "Clients attached or on the descriptor socket."),
        MetricSpec("forebay_uploads", "gauge", (), "Upload sessions that have not ended."),
        MetricSpec(
            "forebay_below_local",
            "gauge",
            (),
            "Sealed uploads and generations that have not landed: lost if the daemon dies now.",
        ),
        MetricSpec(
            "forebay_landed_bytes",
            "gauge",
            (),
            "Bytes of blobs that landed since the start, whether they had to be written or not.",
        ),
        MetricSpec(
            "forebay_shared_bytes",
            "gauge",
            (),
            "Of those, bytes that a run had stored already: they were referenced, not written.",
        ),
        MetricSpec(
            "forebay_delta_bytes",
            "gauge",
            ("kind",),
            "Segments that were stored as differences in the object tier since the start: their "
            "plain bytes, and the stored ones.",
        ),
        MetricSpec(
            "forebay_jobs", "gauge", ("kind", "state"), "Background jobs by kind and state."
        ),
        MetricSpec(
            "forebay_cache_opens",
            "gauge",
            ("result",),
            "Opens of blobs since the start: hit (a local tier has it), miss (it has to come).",
        ),
        MetricSpec(
            "forebay_fetched_bytes",
            "gauge",
            ("tier",),
            "Bytes read from a slow tier since the start, for readers and ahead of them.",
        ),
        MetricSpec(
            "forebay_prefetched_bytes",
            "gauge",
            (),
            "Bytes of blobs that were fetched ahead of their readers since the start.",
        ),
        MetricSpec(
            "forebay_evicted_bytes",
            "gauge",
            ("tier",),
            "Bytes of copies given up since the start, as another tier has them.",
        ),
        MetricSpec("forebay_plans", "gauge", (), "Plans of loaders that are known now."),
        MetricSpec(
            "forebay_loader_wait_seconds_total",
            "counter",
            ("cause",),
            "Seconds that training loops waited for data, as their loaders tell, by cause.",
        ),
        MetricSpec(
            "forebay_loader_read_seconds_total",
            "counter",
            ("cause",),
            "Seconds that threads and workers of loaders spent on reading, by cause.",
        ),
        MetricSpec(
            "forebay_loader_samples_total", "counter", (), "Samples that loaders handed out."
        ),
        MetricSpec(
            "forebay_loader_masked_samples_total",
            "counter",
            (),
            "Samples that loaders masked because they could not be read.",
        ),
        MetricSpec("forebay_start_unix_seconds", "gauge", (), "When this daemon started."),
    )
}
"""Name to metric; ``docs/operations.md`` is tested against it."""

SECONDS_BUCKETS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0)


TOLD: Final = frozenset(name for name in METRICS if name.startswith("forebay_loader_"))
"""Counters that others count: their values come with those of the gauges."""


@dataclass(frozen=True)
class Sample:
    """One value of a gauge, or of a counter that others count."""

    name: str
    labels: tuple[str, ...]
    value: float


class _Gauges:
    """Collects the gauges from one snapshot of the daemon's state."""

    def __init__(self) -> None:
        self.samples: tuple[Sample, ...] = ()

    def collect(self) -> Iterator[Metric]:
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {
            spec.name: GaugeMetricFamily(spec.name, spec.meaning, labels=spec.labels)
            for spec in METRICS.values()
            if spec.kind == "gauge"
        }
        for spec in (METRICS[name] for name in TOLD):
            families[spec.name] = CounterMetricFamily(spec.name, spec.meaning, labels=spec.labels)
        for sample in self.samples:
            families[sample.name].add_metric(sample.labels, sample.value)
        yield from families.values()


class Metrics:
    """The metrics of one daemon; thread-safe, as prometheus_client is."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._gauges = _Gauges()
        self._registry.register(self._gauges)
        self.rpc_calls = self._counter("forebay_rpc_calls_total")
        self.rpc_internal_errors = self._counter("forebay_rpc_internal_errors_total")
        self.rpc_seconds = self._histogram("forebay_rpc_seconds")
        self._tier_seconds = self._histogram("forebay_tier_seconds")
        self._tier_bytes = self._counter("forebay_tier_moved_bytes_total")
        self._tier_errors = self._counter("forebay_tier_errors_total")
        self._tier_calls: dict[tuple[str, str], Histogram] = {}

    def _counter(self, name: str) -> Counter:
        spec = METRICS[name]
        return Counter(name, spec.meaning, spec.labels, registry=self._registry)

    def _histogram(self, name: str) -> Histogram:
        spec = METRICS[name]
        return Histogram(
            spec.name, spec.meaning, spec.labels, registry=self._registry, buckets=SECONDS_BUCKETS
        )

    def tier_call(
        self, tier: str, operation: str, num_bytes: int, seconds: float, failed: bool
    ) -> None:
        """Count one call on a tier. From any thread."""
        calls = self._tier_calls.get((tier, operation))
        if calls is None:
            calls = self._tier_seconds.labels(tier, operation)
            self._tier_calls[tier, operation] = calls
        calls.observe(seconds)
        if num_bytes:
            self._tier_bytes.labels(tier, operation).inc(num_bytes)
        if failed:
            self._tier_errors.labels(tier, operation).inc()

    def render(self, samples: Iterable[Sample]) -> bytes:
        """The exposition text, with *samples* as the gauges' values."""
        self._gauges.samples = tuple(samples)
        return generate_latest(self._registry)
