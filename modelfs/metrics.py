"""Counters, gauges and histograms of one daemon, in one Prometheus registry.

One :class:`Metrics` is made by the daemon (or a test) and handed down; nothing is global. Names and labels
are part of the public interface: dashboards and alerts use them.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """The instruments of one daemon; each attribute is one metric family.

    Labels: ``scheme`` is the store's URL scheme, ``kind`` the name of an error class.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"modelfs_{name}", text, labels, registry=self.registry)

        self.read_bytes = counter("read_bytes", "Bytes given to readers")
        self.hit_bytes = counter("hit_bytes", "Bytes given to readers that were in the cache when asked for")
        self.fetched_bytes = counter("fetched_bytes", "Body bytes received from stores", "scheme")
        self.requests = counter("store_requests", "Data requests sent to stores", "scheme")
        self.retries = counter("store_retries", "Data requests sent again after a failure", "scheme")
        self.store_errors = counter("store_errors", "Failures of stores", "scheme", "kind")
        self.read_errors = counter("read_errors", "Errors given to readers", "kind")
        self.resolutions = counter("resolutions", "Snapshots resolved at stores", "scheme")
        self.evicted_bytes = counter("evicted_bytes", "Bytes removed from the cache to make room")
        self.verified = counter("verified_objects", "Objects whose published digest was checked", "result")
        self.verified_bytes = counter("verified_bytes", "Cached bytes read again to find bad ones")
        self.bad_blocks = counter("bad_blocks", "Cached blocks that did not match their checksum")
        self.cache_errors = counter("cache_errors", "Failed operations on the cache disk")
        self.open_handles = Gauge("modelfs_open_handles", "Open files", registry=self.registry)
        self.fetch_seconds = Histogram(
            "modelfs_fetch_seconds",
            "Seconds one data request took, from sending it to its last byte",
            ["scheme"],
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=self.registry,
        )

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
