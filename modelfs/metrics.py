"""Counters, gauges and histograms of one daemon, in one Prometheus registry.

One :class:`Metrics` is made by the daemon (or a test) and handed down; nothing is global. Names and labels
are part of the public interface: dashboards and alerts use them.
"""

from __future__ import annotations

import math
import platform
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate

import trio
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from modelfs import __version__, errors
from modelfs.errors import ModelfsError

KINDS = tuple(
    name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, ModelfsError)
)
"""The classes of errors: values of the label ``kind``."""

INTERNAL = "internal"
"""The value for any other exception, which is a bug."""

LAGS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, math.inf)
"""Buckets of `LoopLag`, in seconds; a lag above 20 ms is one too much."""


class LoopLag(trio.abc.Instrument, Collector):
    """How long trio's loop was kept from looking at its events each time, as a histogram.

    That long an event may have waited before anybody saw it. The clock ``cpu`` counts only what the loop
    itself computed; ``wall`` also that it waited for a processor, for the interpreter or for a disk.
    Costs about a microsecond for each turn of the loop, which is why it is no `Histogram`.
    """

    def __init__(self) -> None:
        self._began = time.monotonic(), time.thread_time()
        self._sums = {"wall": 0.0, "cpu": 0.0}
        self._counts = {clock: [0] * len(LAGS) for clock in self._sums}

    def after_io_wait(self, timeout: float) -> None:
        """Begin to measure: tasks run from now on."""
        self._began = time.monotonic(), time.thread_time()

    def before_io_wait(self, timeout: float) -> None:
        """Count: the loop looks at its events again."""
        wall, cpu = self._began
        self._count("wall", time.monotonic() - wall)
        self._count("cpu", time.thread_time() - cpu)

    def _count(self, clock: str, seconds: float) -> None:
        self._sums[clock] += seconds
        self._counts[clock][bisect_left(LAGS, seconds)] += 1

    def collect(self) -> Iterable[Metric]:
        """Return the histogram."""
        family = HistogramMetricFamily(
            "modelfs_loop_lag_seconds",
            "Seconds for which the loop did not look at its events",
            labels=["clock"],
        )
        for clock, counts in self._counts.items():
            bounds = ["+Inf" if lag == math.inf else str(lag) for lag in LAGS]
            buckets = list(zip(bounds, accumulate(counts), strict=True))
            family.add_metric([clock], buckets, self._sums[clock])
        return [family]


class Waits(Collector):
    """Reads that wait for their bytes: how many, and since when the one that waits longest.

    Reads begin and end in one thread; any may collect.
    """

    def __init__(self) -> None:
        self._since: dict[object, float] = {}

    @contextmanager
    def one(self) -> Iterator[None]:
        """Count one more for as long as this takes."""
        who = object()
        self._since[who] = time.monotonic()
        try:
            yield
        finally:
            del self._since[who]

    def collect(self) -> Iterable[Metric]:
        """Return both as gauges."""
        now, since = time.monotonic(), list(self._since.values())
        return [
            GaugeMetricFamily("modelfs_waiting_reads", "Reads that wait for their bytes", len(since)),
            GaugeMetricFamily(
                "modelfs_longest_wait_seconds",
                "Seconds for which one of these reads has waited, the most of all; 0 if none waits",
                now - min(since, default=now),
            ),
        ]


class States(Collector):
    """The state of each model, as a gauge of 1; models come and go.

    Attributes:
        read: returns name and state of each; called in any thread, whenever this is collected.

    """

    def __init__(self) -> None:
        self.read: Callable[[], Iterable[tuple[str, str]]] = tuple

    def collect(self) -> Iterable[Metric]:
        """Return the gauge."""
        family = GaugeMetricFamily(
            "modelfs_model_state", "1 for what each configured model is", labels=["model", "state"]
        )
        for model, state in self.read():
            family.add_metric((model, state), 1)
        return [family]


class Metrics:
    """The instruments of one daemon; each attribute is one metric family.

    docs/metrics.md describes them and their labels. A gauge with a function asks it whenever it is collected.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"modelfs_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"modelfs_{name}", text, labels, registry=self.registry)

        ProcessCollector(registry=self.registry)
        build = gauge("build_info", "1, for the versions of what runs", "version", "python")
        build.labels(__version__, platform.python_version()).set(1)
        self.mount = gauge("mount_info", "1, for how the kernel is served", "transport", "passthrough")
        self.handovers = counter("handovers", "Daemons that took the mount over from one before them")
        self.models = gauge("models", "Models, by what can be had of them", "state")
        self.model_states = States()
        self.registry.register(self.model_states)
        self.reads = counter("reads", "Reads, by whether the bytes were in the cache", "scheme", "result")
        self.read_bytes = counter("read_bytes", "Bytes given to readers")
        self.hit_bytes = counter("hit_bytes", "Bytes given to readers that were in the cache when asked for")
        self.fetched_bytes = counter("fetched_bytes", "Body bytes received from stores", "scheme")
        self.requests = counter("store_requests", "Data requests sent to stores", "scheme")
        self.retries = counter("store_retries", "Data requests sent again after a failure", "scheme")
        self.fallbacks = counter("fallbacks", "Times a flight went on at another store", "from", "to")
        self.store_errors = counter("store_errors", "Failures of stores", "scheme", "kind")
        self.read_errors = counter("read_errors", "Errors given to readers", "kind")
        for kind in (*KINDS, INTERNAL):  # from 0 on: a counter that begins with 1 never increased
            self.read_errors.labels(kind)
        self.resolutions = counter("resolutions", "Snapshots resolved at stores", "scheme")
        self.cache_bytes = gauge("cache_bytes", "Bytes of disk that cached objects use")
        self.cache_limit = gauge("cache_limit_bytes", "Bytes of disk that they may use; +Inf without a limit")
        self.cache_free = gauge("cache_free_bytes", "Bytes that are free on the disk of the cache")
        self.cache_min_free = gauge("cache_min_free_bytes", "Bytes that the cache leaves free there")
        self.cache_objects = gauge("cache_objects", "Objects in the cache, complete or not")
        self.evicted_bytes = counter("evicted_bytes", "Bytes evicted from the cache")
        self.evicted_objects = counter("evicted_objects", "Objects evicted whole from the cache")
        self.verified = counter("verified_objects", "Objects whose published digest was checked", "result")
        for result in ("match", "mismatch"):
            self.verified.labels(result)
        self.verified_bytes = counter("verified_bytes", "Cached bytes read again to find bad ones")
        self.bad_blocks = counter("bad_blocks", "Cached blocks that did not match their checksum")
        self.cache_errors = counter("cache_errors", "Failed operations on the cache disk")
        self.fuse_requests = counter("fuse_requests", "Requests from the kernel", "operation")
        self.opens = counter("opens", "Files opened")
        self.passthrough_opens = counter(
            "passthrough_opens", "Files opened that the kernel reads without the daemon"
        )
        self.open_handles = gauge("open_handles", "Open files")
        self.breaker = gauge(
            "breaker_state",
            "Circuit breaker of a store that failed since the start: 0 closed, 1 half-open, 2 open",
            "store",
        )
        self.fetch_seconds = Histogram(
            "modelfs_fetch_seconds",
            "Seconds one data request took, from sending it to its last byte",
            ["scheme"],
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=self.registry,
        )
        self.loop_lag = LoopLag()
        self.registry.register(self.loop_lag)
        self.waits = Waits()
        self.registry.register(self.waits)
        self.read_deadline = gauge("read_deadline_seconds", "Seconds after which a read without bytes fails")
        self.ready = gauge("ready", "Whether the mount answered when this was asked for")

    def note_breaker(self, store: str, state: str) -> None:
        """Set the gauge of a breaker."""
        self.breaker.labels(store).set(("closed", "half-open", "open").index(state))

    def value(self, name: str, **labels: str) -> float:
        """Return the sum of all samples of family `name` whose labels include `labels`; 0 if there is none.

        `name` is a sample's name as exported, for example ``modelfs_fetched_bytes_total``.
        """
        return sum(
            sample.value
            for family in self.registry.collect()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )
