"""A real Prometheus scrapes a real daemon as docs/operations.md says: every panel shows something."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from modelfs.testing.faults import Fault, FaultProxy
from tests import prometheus
from tests.faults.rig import noise
from tests.mount.harness import alone, eventually, mounted, unused_port
from tests.origin import MANIFEST, Origin

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
FILES = {f"{number}.dat": noise(200_000, str(number)) for number in range(8)}


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin(FILES) as own:
        own.digests = {name: sha256(data).hexdigest() for name, data in FILES.items() if name != "7.dat"}
        yield own


def asked(client: httpx.Client, query: str) -> list[dict[str, Any]]:
    answer = client.get("/query", params={"query": query}).json()
    assert answer["status"] == "success", answer
    result: list[dict[str, Any]] = answer["data"]["result"]
    return result


def is_up(client: httpx.Client) -> bool:
    try:
        return [row["value"][1] for row in asked(client, "up")] == ["1"]
    except (httpx.TransportError, ValueError):  # it starts
        return False


def scrapes(client: httpx.Client) -> float:
    return float(asked(client, "count_over_time(up[1h])")[0]["value"][1])


def test_prometheus_gets_every_series_of_the_dashboard(place: Path, origin: Origin) -> None:
    (text,) = re.findall(r"^```yaml\n(scrape_configs:.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    config = yaml.safe_load(text)
    shutil.copy(prometheus.ALERTS, place / config["rule_files"][0])
    port = unused_port()
    (job,) = config["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["127.0.0.1:9180"]}]
    job["static_configs"][0]["targets"] = [f"127.0.0.1:{port}"]
    often = ("scrape_interval", "scrape_timeout", "evaluation_interval")
    config["global"] = dict.fromkeys(often, "500ms")
    with FaultProxy(origin.url.rstrip("/")) as proxy:
        models = (
            f"  m: [{proxy.url}/, {origin.url}]\n"
            f"  missing: {{source: 'file://{place}/nothing', optional: true}}\n"
        )
        settings = f"http: 127.0.0.1:{port}\nrefresh: 0\nmodels:\n{models}"
        with (
            mounted(place, config=settings, env=alone(place), transport="kernel") as mount,
            prometheus.prometheus(place, config) as client,
        ):

            def read(*names: str) -> None:
                for name in names:
                    assert (mount.path / "m" / name).read_bytes() == FILES[name]

            read("0.dat", "1.dat")
            proxy.follow(lambda asked: None if asked.path.endswith(MANIFEST) else Fault("status-503"))
            eventually(lambda: is_up(client))
            read("0.dat", "2.dat", "3.dat", "4.dat", "5.dat")
            origin.files["7.dat"] = b"another version"
            proxy.follow(())
            with pytest.raises(OSError, match="Stale"):
                read("7.dat")
            until = scrapes(client) + 2
            eventually(lambda: scrapes(client) >= until)
            panels = json.loads(prometheus.DASHBOARD.read_text())["panels"]
            for panel in (panel for panel in panels if panel["type"] != "row"):
                for query, target in zip(prometheus.targets([panel]), panel["targets"], strict=True):
                    rows = asked(client, query)
                    assert rows, panel["title"]
                    named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
                    assert all(named <= row["metric"].keys() for row in rows), panel["title"]
            groups = client.get("/rules").json()["data"]["groups"]
            health = {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}
            assert health == {rule["alert"]: "ok" for rule in prometheus.rules()}
