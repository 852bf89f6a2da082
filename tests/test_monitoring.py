"""The alert rules and the dashboard: valid, documented, and made of what docs/metrics.md promises."""

from __future__ import annotations

import json
import re
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from prometheus_client import generate_latest

from modelfs import errors
from modelfs.cli import app
from modelfs.metrics import KINDS, Metrics
from tests import prometheus
from tests.test_docs import REPOSITORY, anchors

DASHBOARD: dict[str, Any] = json.loads(prometheus.DASHBOARD.read_text())
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
PAGE = REPOSITORY / "docs" / "operations.md"


def promtool(*words: str, given: str = "") -> None:
    result = subprocess.run(["promtool", *words], input=given, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not re.search("warn|lint", result.stdout + result.stderr, re.IGNORECASE), result.stdout


def test_promtool_accepts_the_rules_and_the_metrics() -> None:
    promtool("check", "rules", "--lint-fatal", str(prometheus.ALERTS))
    promtool("check", "metrics", given=generate_latest(Metrics().registry).decode())


@pytest.mark.parametrize("rule", prometheus.rules(), ids=lambda rule: rule["alert"])
def test_an_alert_says_how_bad_it_is_and_where_to_read_on(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    path, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert (REPOSITORY / path, anchor) == (PAGE, rule["alert"].lower())
    assert anchor in anchors(PAGE)
    (row,) = re.findall(rf"^\| \[{rule['alert']}\]\(#{anchor}\) \| (\w+) \| (.+) \|$", PAGE.read_text(), re.M)
    assert row == (rule["labels"]["severity"], rule.get("for", "at once"))


def test_every_query_of_the_dashboard_is_valid(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    queries = prometheus.targets(PANELS)
    rules = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(queries)]
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", str(file))


def test_alerts_and_dashboard_use_metrics_that_the_page_promises() -> None:
    rows = re.findall(r"^\| `(modelfs_\w+)` \| (\w+) \|", (REPOSITORY / "docs/metrics.md").read_text(), re.M)
    promised = {f"{name}_bucket" if kind == "histogram" else name for name, kind in rows}
    used = {rule["expr"] for rule in prometheus.rules()} | set(prometheus.targets(PANELS))
    names = {name for query in used for name in re.findall(r"\bmodelfs_\w+", query)}
    assert names <= promised


def test_the_dashboard_is_one_that_grafana_loads_anywhere() -> None:
    assert DASHBOARD["schemaVersion"] == 42
    assert "id" not in DASHBOARD  # of one database
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert list(variables) == ["datasource", "job", "instance"]
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    source = {"type": "prometheus", "uid": "${datasource}"}
    for asker in (*PANELS, *(target for panel in PANELS for target in panel["targets"])):
        assert asker["datasource"] == source
    for name in ("job", "instance"):
        assert variables[name]["datasource"] == source
    for target in (target for panel in PANELS for target in panel["targets"]):
        selectors = re.findall(r"\b(?:modelfs_\w+|process_\w+|up)\{(.*?)\}", target["expr"])
        assert selectors
        assert all(each.startswith('job=~"$job", instance=~"$instance"') for each in selectors)


def test_the_panels_have_their_place_and_the_page_names_their_rows() -> None:
    every = DASHBOARD["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    assert len({panel["title"] for panel in every}) == len(every)
    assert all(panel["description"].endswith(".") for panel in PANELS)
    rows = [panel["title"] for panel in every if panel["type"] == "row"]
    assert rows == ["Readers", "Cache", "Stores", "Integrity", "Life"]
    assert re.findall(r"^\| \*\*(\w+)\*\* \|", PAGE.read_text(), re.MULTILINE) == rows
    for panel in every:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
    for one, other in combinations((panel["gridPos"] for panel in every), 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]


def test_the_commands_of_the_page_are_there_with_their_flags() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    text = re.sub(r"\s+", " ", PAGE.read_text())
    used = [each.split() for each in re.findall(r"[`$] ?modelfs ([a-z][^`$]*)", text)]
    assert {words[0] for words in used} >= {"status", "umount", "mount", "upgrade", "refresh", "verify", "ls"}
    for words in used:
        command = commands[words[0]]
        known = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, words


def test_the_page_says_what_to_do_about_every_error_of_a_store() -> None:
    rows = re.findall(r"^\| (`[A-Z]\w+`.*?) \|", PAGE.read_text(), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    kinds = {name for name in KINDS if issubclass(getattr(errors, name), errors.StoreError)}
    assert kinds - {"StoreError"} <= named
