"""Prometheus's own programs on what a daemon says: which alerts it raises, and what a query finds in it."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.mount.harness import unused_port

MONITORING = Path(__file__).parents[1] / "packaging" / "monitoring"
ALERTS = MONITORING / "alerts.yaml"
DASHBOARD = MONITORING / "dashboard.json"
TARGET = {"job": "modelfs", "instance": "node:9180"}

Scrape = Mapping[str, float]
"""Series, with all their labels, and their values."""

BEFORE, AFTER = 20, 75
"""Minutes for which what was scraped first holds, and what was scraped then."""


def rules() -> list[dict[str, Any]]:
    """Return the alert rules."""
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def targets(panels: list[dict[str, Any]]) -> list[str]:
    """Return the queries of panels, with plain values for the variables of Grafana."""
    queries = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    values = {"$__rate_interval": "1m", "$job": ".*", "$instance": ".*"}
    for name, value in values.items():
        queries = [query.replace(name, value) for query in queries]
    return queries


def metrics(url: str) -> str:
    """Return what is served for Prometheus at `url`."""
    answer = httpx.get(f"{url}/metrics", trust_env=False, timeout=20)
    answer.raise_for_status()
    return answer.text


def scrape(url: str) -> Scrape:
    """Return what Prometheus would store of a scrape."""
    try:
        families = text_string_to_metric_families(metrics(url))
    except httpx.HTTPError:
        return {_series("up", {}): 0.0}
    samples = (sample for family in families for sample in family.samples)
    return {_series("up", {}): 1.0} | {_series(s.name, s.labels): s.value for s in samples}


def value(scraped: Scrape, name: str) -> float:
    """Return the sum of the samples of this name."""
    return sum(number for series, number in scraped.items() if series.startswith(f"{name}{{"))


def _series(name: str, labels: Mapping[str, str]) -> str:
    return f"{name}{{{','.join(f'{key}={json.dumps(text)}' for key, text in {**labels, **TARGET}.items())}}}"


def fired(before: Scrape, after: Scrape | None = None) -> dict[str, list[dict[str, str]]]:
    """Return which alerts fire, and the labels and annotations of each.

    The rules are evaluated by ``promtool test rules``, every minute, while `before` holds for
    `BEFORE` and then `after` for `AFTER` minutes: what was scraped in moments stands for what lasts.
    """
    names = {word for rule in rules() for word in re.findall(r"\b(?:up|modelfs_\w+)", rule["expr"])}
    later = before if after is None else after
    series = [each for each in {**before, **later} if each.partition("{")[0] in names]
    held = [
        {"series": each, "values": f"{_held(before.get(each), BEFORE)} {_held(later.get(each), AFTER)}"}
        for each in series
    ]
    checks = [
        {"alertname": rule["alert"], "eval_time": f"{minute}m"}
        for rule in rules()
        for minute in range(2, BEFORE + AFTER, 4)
    ]
    test = {"interval": "1m", "input_series": held, "alert_rule_test": checks}
    document = {"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": [test]}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(document, file)
        file.flush()
        command = ["promtool", "test", "rules", file.name]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    # No alert is expected: promtool tells each that there is.
    said = result.stdout + result.stderr
    found: dict[str, list[dict[str, str]]] = {}
    for labels, texts in re.findall(r"Labels:\{(.*)\}\n *Annotations:\{(.*)\}", said):
        alert = _texts(labels) | _texts(texts)
        alerts = found.setdefault(alert.pop("alertname"), [])
        if alert not in alerts:
            alerts.append(alert)
    assert (result.returncode == 0) == (not found), said
    assert not re.search("err:|<error|<no value>", said), said
    return found


def _held(number: float | None, minutes: int) -> str:
    return f"_x{minutes}" if number is None else f"{number!r}+0x{minutes - 1}"


def _texts(pairs: str) -> dict[str, str]:
    found = re.findall(r'(\w+)=("(?:[^"\\]|\\.)*")', pairs)
    return {name: json.loads(text) for name, text in found}


@contextmanager
def prometheus(directory: Path, config: Mapping[str, Any]) -> Iterator[httpx.Client]:
    """Run a Prometheus with this configuration; yields a client of its API."""
    file = directory / "prometheus.yaml"
    file.write_text(yaml.safe_dump(dict(config)))
    subprocess.run(["promtool", "check", "config", str(file)], check=True, capture_output=True)
    address = f"127.0.0.1:{unused_port()}"
    command = ["prometheus", f"--config.file={file}", f"--storage.tsdb.path={directory / 'tsdb'}"]
    with (directory / "prometheus.log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://{address}/api/v1", trust_env=False, timeout=20) as client:
            yield client
    finally:
        process.terminate()
        process.wait(30)
