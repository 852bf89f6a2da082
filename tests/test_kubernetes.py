"""The manifests: kustomize builds them, the schemas of Kubernetes accept them, a mount gets what it needs."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from modelfs import config
from tests import kustomize

K8S = Path(__file__).parents[1] / "k8s"
KUSTOMIZATIONS = ["base", *sorted(f"overlays/{path.name}" for path in (K8S / "overlays").iterdir())]
VERSION = "1.37"
"""Of the schemas; pinned, so that a new version of the package changes nothing by itself."""

Object = dict[str, Any]


def validate(found: Object) -> None:
    """Hold `found` against the schema of its kind, in which no unknown member is allowed."""
    if found["kind"] == "ServiceMonitor":  # not one of Kubernetes' own
        schema = Path(__file__).with_name("schemas") / "servicemonitor.json"
        jsonschema.validate(found, json.loads(schema.read_text()))
        return
    kubernetes_validate.validate(found, VERSION, strict=True)


@pytest.fixture(scope="module", params=KUSTOMIZATIONS)
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return kustomize.build(K8S / request.param)


def only(objects: list[Object], kind: str, name: str = "modelfs") -> Object:
    (found,) = [o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name]
    return found


def test_every_object_is_valid(objects: list[Object]) -> None:
    assert objects
    for found in objects:
        validate(found)


def test_the_schemas_refuse_what_is_wrong() -> None:
    daemonset = only(kustomize.build(K8S / "base"), "DaemonSet")
    daemonset["spec"]["template"]["spec"]["hostPid"] = True
    with pytest.raises(kubernetes_validate.ValidationError, match="hostPid"):
        validate(daemonset)
    monitor = only(kustomize.build(K8S / "overlays/monitoring"), "ServiceMonitor")
    monitor["spec"]["endpoints"][0]["intervall"] = "30s"
    with pytest.raises(jsonschema.ValidationError, match="intervall"):
        validate(monitor)


def test_the_mount_is_a_child_of_what_pods_mount(objects: list[Object]) -> None:
    pod = only(objects, "DaemonSet")["spec"]["template"]["spec"]
    (container,) = [c for c in pod["containers"] if c["name"] == "modelfs"]
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounts["shared"]["mountPropagation"] == "Bidirectional"
    assert volumes["shared"]["hostPath"]["path"] == mounts["shared"]["mountPath"]
    env = {each["name"]: each.get("value") for each in container["env"]}
    assert Path(env["MODELFS_MOUNTPOINT"]).parent == Path(mounts["shared"]["mountPath"])
    assert volumes["fuse"]["hostPath"] == {"path": "/dev/fuse", "type": "CharDevice"}
    assert volumes["cache"]["hostPath"]["path"] == mounts["cache"]["mountPath"] == "/var/cache/modelfs"
    # All else that is written to on a read-only root:
    assert {"/run", "/tmp"} <= {mounts[name]["mountPath"] for name in volumes if "emptyDir" in volumes[name]}


def test_the_daemonset_is_on_every_node_and_leaves_it_gently(objects: list[Object]) -> None:
    spec = only(objects, "DaemonSet")["spec"]
    pod = spec["template"]["spec"]
    (container,) = [c for c in pod["containers"] if c["name"] == "modelfs"]
    assert spec["updateStrategy"]["rollingUpdate"]["maxUnavailable"] == 1
    assert pod["priorityClassName"] == "system-node-critical"
    assert pod["tolerations"] == [{"operator": "Exists"}]
    assert pod["nodeSelector"] == {"kubernetes.io/os": "linux"}
    assert pod["hostPID"] is True
    assert container["securityContext"]["privileged"] is True
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["resources"]["limits"]["memory"]
    # It drains, unless a keeper has what the next pod goes on with.
    assert ("lifecycle" in container) != ("MODELFS_KEEPER" in {each["name"] for each in container["env"]})
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 600
    assert container["livenessProbe"] != container["readinessProbe"]


def test_the_configuration_is_one_of_modelfs(
    objects: list[Object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pod = only(objects, "DaemonSet")["spec"]["template"]["spec"]
    (volume,) = [v for v in pod["volumes"] if v["name"] == "config"]
    data = only(objects, "ConfigMap", volume["configMap"]["name"])["data"]
    (tmp_path / "config.yaml").write_text(data["config.yaml"])
    settings = config.load(mountpoint=None, config_file=tmp_path / "config.yaml")
    assert settings.models
    assert settings.keep_going


def test_only_who_takes_taints_away_may_ask_the_api(objects: list[Object]) -> None:
    pod = only(objects, "DaemonSet")["spec"]["template"]["spec"]
    rules = [rule for o in objects if o["kind"] in ("Role", "ClusterRole") for rule in o["rules"]]
    tokens = {v["name"] for v in pod["volumes"] if "projected" in v}
    holders = [c for c in pod["containers"] if tokens & {m["name"] for m in c["volumeMounts"]}]
    assert pod["automountServiceAccountToken"] is False
    assert [c["name"] for c in holders] == (["untaint"] if rules else [])
    assert not any(c["securityContext"].get("privileged") for c in holders)
    assert rules in ([], [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "patch"]}])


def test_the_keeper_stays_where_the_daemon_is(objects: list[Object]) -> None:
    daemonsets = [o["spec"] for o in objects if o["kind"] == "DaemonSet"]
    pods = [spec["template"]["spec"] for spec in daemonsets]
    for member in ("tolerations", "nodeSelector", "priorityClassName"):
        assert all(pod[member] == pods[0][member] for pod in pods)
    selectors = [spec["selector"]["matchLabels"] for spec in daemonsets]
    assert all(a == b or not a.items() <= b.items() for a in selectors for b in selectors)
    for spec in daemonsets[1:]:
        assert spec["updateStrategy"] == {"type": "OnDelete"}


def test_one_image_is_named(objects: list[Object]) -> None:
    pods = [o["spec"]["template"]["spec"] for o in objects if o["kind"] == "DaemonSet"]
    assert len({container["image"] for pod in pods for container in pod["containers"]}) == 1


def test_who_asks_for_health_and_metrics_finds_the_port(objects: list[Object]) -> None:
    pod = only(objects, "DaemonSet")["spec"]["template"]
    (container,) = [c for c in pod["spec"]["containers"] if c["name"] == "modelfs"]
    (port,) = container["ports"]
    env = {each["name"]: each.get("value") for each in container["env"]}
    assert env["MODELFS_HTTP"].endswith(f":{port['containerPort']}")
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[name]["httpGet"]["port"] == port["name"]
    service = only(objects, "Service")
    assert [each["targetPort"] for each in service["spec"]["ports"]] == [port["name"]]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    (rule,) = only(objects, "NetworkPolicy")["spec"]["ingress"]
    assert rule["ports"] == [{"port": port["name"]}]
    for monitor in (o for o in objects if o["kind"] == "ServiceMonitor"):
        (endpoint,) = monitor["spec"]["endpoints"]
        assert endpoint["port"] in [each["name"] for each in service["spec"]["ports"]]
        selected = [
            o["metadata"]["name"]
            for o in objects
            if o["kind"] == "Service"
            and monitor["spec"]["selector"]["matchLabels"].items() <= o["metadata"].get("labels", {}).items()
        ]
        assert selected == ["modelfs"]


def test_all_components_together(tmp_path: Path) -> None:
    page = Path(__file__).parents[1] / "docs/kubernetes.md"
    (text,) = re.findall(
        r"^```yaml\n(# kustomization.yaml\n.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE
    )
    own = yaml.safe_load(text)
    assert {Path(name).name for name in own["components"]} == {p.name for p in (K8S / "components").iterdir()}
    for member in ("resources", "components"):  # as if it lay in k8s/ours
        own[member] = [os.path.relpath(K8S / "ours" / name, tmp_path.resolve()) for name in own[member]]
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(own))
    (tmp_path / "config.yaml").write_text("models: {ours: 's3://models/ours/'}\n")
    objects = kustomize.build(tmp_path)
    for found in objects:
        validate(found)
    pods = [o["spec"]["template"]["spec"] for o in objects if o["kind"] == "DaemonSet"]
    assert [len(pod["containers"]) for pod in pods] == [2, 1]
    assert {c["image"] for pod in pods for c in pod["containers"]} == {"ghcr.io/ours/modelfs:0.1.0"}
    (volume,) = [v for v in pods[0]["volumes"] if v["name"] == "config"]
    assert "ours" in only(objects, "ConfigMap", volume["configMap"]["name"])["data"]["config.yaml"]


def test_secrets_are_only_referred_to(objects: list[Object]) -> None:
    assert not [o for o in objects if o["kind"] == "Secret"]


def test_every_file_belongs_to_something() -> None:
    used = set()
    for file in K8S.rglob("kustomization.yaml"):
        document = yaml.safe_load(file.read_text())
        named = [
            *document.get("resources", []),
            *document.get("components", []),
            *(p["path"] for p in document.get("patches", [])),
        ]
        named += [name for made in document.get("configMapGenerator", []) for name in made["files"]]
        used |= {(file.parent / name).resolve() for name in named} | {file.resolve()}
    ours = {f.resolve() for part in ("base", "components", "overlays") for f in (K8S / part).rglob("*.yaml")}
    assert ours - used == set()
