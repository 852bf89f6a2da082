"""The chart: Helm renders what k8s/base has, each value in its place, and refuses values that are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modelfs import config
from tests import helm, kustomize
from tests.test_kubernetes import K8S, Object, only, validate

CHART = K8S / "chart"

VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": {
        "image": {"repository": "ghcr.io/ours/modelfs", "tag": "1.2.3", "pullPolicy": "Always"},
        "imagePullSecrets": [{"name": "ghcr"}],
        "config": {"models": {"churn": {"source": "s3://models/churn/", "pin": True}}},
        "env": [{"name": "AWS_REGION", "value": "eu-central-1"}],
        "sharedPath": "/srv/modelfs",
        "cachePath": "/mnt/nvme/modelfs",
        "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/models"}},
        "podAnnotations": {"example.com/team": "ml"},
        "nodeSelector": {"kubernetes.io/os": "linux", "models": "yes"},
        "maxUnavailable": "10%",
        "terminationGracePeriodSeconds": 60,
        "resources": {"limits": {"memory": "2Gi"}},
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}, "interval": "1m"},
        "networkPolicy": {"enabled": True, "scrapers": [{"podSelector": {}}]},
        "holder": {"enabled": True, "resources": {"limits": {"memory": "100Mi"}}},
    },
    "holder": {"holder": {"enabled": True}},
    "monitoring": {"serviceMonitor": {"enabled": True}},
    "bare": {"networkPolicy": {"enabled": False}, "credentialsSecret": "", "priorityClassName": ""},
}


@pytest.fixture(scope="module", params=VARIANTS)
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return helm.render(CHART, VARIANTS[request.param])


def test_every_object_is_valid(objects: list[Object]) -> None:
    assert {"DaemonSet", "ConfigMap", "ServiceAccount"} <= {found["kind"] for found in objects}
    for found in objects:
        validate(found)


def test_the_configuration_is_one_of_modelfs(objects: list[Object], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(only(objects, "ConfigMap")["data"]["config.yaml"])
    assert config.load(mountpoint=None, config_file=tmp_path / "config.yaml").models


def test_the_mount_is_a_child_of_what_pods_mount(objects: list[Object]) -> None:
    pod = only(objects, "DaemonSet")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (path,) = [v["hostPath"]["path"] for v in pod["volumes"] if v["name"] == "shared"]
    (mount,) = [m for m in container["volumeMounts"] if m["name"] == "shared"]
    assert mount == {"name": "shared", "mountPath": path, "mountPropagation": "Bidirectional"}
    assert {"name": "MODELFS_MOUNTPOINT", "value": f"{path}/models"} in container["env"]


@pytest.mark.parametrize(
    ("variant", "kustomization", "name"),
    [
        ("defaults", "base", "modelfs"),
        ("holder", "overlays/holder", "modelfs"),
        ("holder", "overlays/holder", "modelfs-keeper"),
    ],
)
def test_what_is_rendered_is_what_the_manifests_have(variant: str, kustomization: str, name: str) -> None:
    def comparable(objects: list[Object]) -> tuple[Object, Object, Object]:
        spec = only(objects, "DaemonSet", name)["spec"]
        pod = spec["template"]["spec"]
        pod["containers"][0].pop("imagePullPolicy", None)
        for member in ("env", "volumeMounts"):
            pod["containers"][0][member].sort(key=lambda each: str(each["name"]))
        pod["volumes"].sort(key=lambda volume: str(volume["name"]))
        for volume in pod["volumes"]:
            volume.pop("configMap", None)  # kustomize adds a hash to its name
        policy = only(objects, "NetworkPolicy", name)["spec"]
        policy.pop("podSelector")
        return pod, spec["updateStrategy"], policy

    ours, theirs = helm.render(CHART, VARIANTS[variant]), kustomize.build(K8S / kustomization)
    assert comparable(ours) == comparable(theirs)


def test_what_is_scraped_is_what_the_manifests_have() -> None:
    ours, theirs = helm.render(CHART, VARIANTS["monitoring"]), kustomize.build(K8S / "overlays/monitoring")
    for kind in ("ServiceMonitor", "Service"):
        mine, other = only(ours, kind)["spec"], only(theirs, kind)["spec"]
        del mine["selector"], other["selector"]  # a release has one more label
        assert mine == other


def test_values_arrive() -> None:
    values = VARIANTS["everything"]
    objects = helm.render(CHART, values)
    spec = only(objects, "DaemonSet")["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == "ghcr.io/ours/modelfs:1.2.3"
    assert pod["imagePullSecrets"] == values["imagePullSecrets"]
    assert values["env"][0] in container["env"]
    assert [v["hostPath"]["path"] for v in pod["volumes"] if v["name"] == "cache"] == [values["cachePath"]]
    assert (
        only(objects, "ServiceAccount")["metadata"]["annotations"] == values["serviceAccount"]["annotations"]
    )
    assert spec["template"]["metadata"]["annotations"].items() >= values["podAnnotations"].items()
    assert pod["nodeSelector"] == values["nodeSelector"]
    assert spec["updateStrategy"]["rollingUpdate"]["maxUnavailable"] == "10%"
    assert pod["terminationGracePeriodSeconds"] == 60
    assert container["resources"]["limits"] == {"memory": "2Gi"}
    monitor = only(objects, "ServiceMonitor")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert monitor["spec"]["endpoints"][0]["interval"] == "1m"
    assert only(objects, "NetworkPolicy")["spec"]["ingress"][0]["from"] == [{"podSelector": {}}]
    (keeper,) = only(objects, "DaemonSet", "modelfs-keeper")["spec"]["template"]["spec"]["containers"]
    assert keeper["image"] == container["image"]
    assert keeper["resources"]["limits"] == {"memory": "100Mi"}


def test_wrong_values_are_refused() -> None:
    wrong = {
        "sharedPath": "/",
        "cachePath": "cache",
        "maxUnavailable": 0,
        "tolerations": {"operator": "Exists"},
        "replicas": 3,
        "holder": {"enable": True},
    }
    with pytest.raises(helm.RenderError) as refused:
        helm.render(CHART, wrong)
    assert [name for name in wrong if name not in str(refused.value)] == []
