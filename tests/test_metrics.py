"""The metrics are those of docs/metrics.md, and named as Prometheus wants it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from modelfs.metrics import Metrics

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
OWN = {
    (family.name + "_total" * (family.type == "counter"), family.type)
    for family in Metrics().registry.collect()
    if family.name.startswith("modelfs_")
}


def test_the_page_names_every_metric_and_its_type() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", PAGE.read_text(), re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == OWN


@pytest.mark.parametrize(("name", "type_"), sorted(OWN))
def test_names_are_as_prometheus_wants_them(name: str, type_: str) -> None:
    # https://prometheus.io/docs/practices/naming/: base units at the end, _total for what only grows
    assert re.fullmatch(r"modelfs_[a-z]+(_[a-z]+)*", name)
    assert name.endswith("_total") == (type_ == "counter")
    assert not re.search(r"(milli|micro|kilo|kib|mib|gib|_ms|_percent|_minutes)", name)
    if type_ == "histogram":
        assert name.endswith("_seconds")


def test_what_is_served_is_what_parsers_of_prometheus_take() -> None:
    metrics = Metrics()
    metrics.reads.labels("s3", "hit").inc()
    metrics.note_breaker('s3://a"b\\c\n', "open")
    families = list(text_string_to_metric_families(generate_latest(metrics.registry).decode()))
    samples = {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}
    assert samples["modelfs_reads_total", "hit", "s3"] == 1
    assert samples["modelfs_breaker_state", 's3://a"b\\c\n'] == 2
    (build,) = [
        sample for family in families for sample in family.samples if family.name == "modelfs_build_info"
    ]
    assert build.value == 1
