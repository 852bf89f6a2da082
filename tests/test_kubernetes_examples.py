"""Examples of pods that read models: valid, and each sees a mount that is made after it has started."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.test_kubernetes import K8S, Object, validate

EXAMPLES = sorted((K8S / "examples").glob("*.yaml"))
SHARED = "/var/lib/modelfs"


def read(file: Path) -> list[Object]:
    return list(yaml.safe_load_all(file.read_text()))


def pods(objects: list[Object]) -> list[Object]:
    """The specifications of all pods that `objects` make."""
    found = [o["spec"]["template"]["spec"] for o in objects if "template" in o["spec"]]
    return found + [as_pod(o)["spec"] for o in objects if o["kind"] == "InferenceService"]


def as_pod(service: Object) -> Object:
    """The pod that an InferenceService describes: KServe takes a PodSpec, and one container as ``model``."""
    predictor = dict(service["spec"]["predictor"])
    container = {k: v for k, v in predictor.pop("model").items() if k != "modelFormat"}
    containers = [{"name": "kserve-container", **container}]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": service["metadata"],
        "spec": {"containers": containers, **predictor},
    }


@pytest.fixture(params=EXAMPLES, ids=lambda file: file.stem)
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return read(request.param)


def test_every_object_is_valid(objects: list[Object]) -> None:
    for found in objects:
        validate(as_pod(found) if found["kind"] == "InferenceService" else found)


def shared(pod: Object, objects: list[Object]) -> set[str]:
    """Names of the pod's volumes that are the directory above the mount."""
    volumes = {o["metadata"]["name"]: o["spec"] for o in objects if o["kind"] == "PersistentVolume"}
    claims = {
        o["metadata"]["name"]: volumes[o["spec"]["volumeName"]]
        for o in objects
        if o["kind"] == "PersistentVolumeClaim"
    }

    def path(volume: dict[str, Any]) -> str | None:
        claim = volume.get("persistentVolumeClaim")
        source = claims[claim["claimName"]] if claim else volume
        found: str | None = source.get("hostPath", {}).get("path")
        return found

    return {volume["name"] for volume in pod["volumes"] if path(volume) == SHARED}


def test_pods_see_mounts_that_come_later(objects: list[Object]) -> None:
    assert pods(objects)
    for pod in pods(objects):
        (name,) = shared(pod, objects)
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            (mount,) = [m for m in container["volumeMounts"] if m["name"] == name]
            assert mount["mountPropagation"] == "HostToContainer"
            assert mount["readOnly"] is True
            assert not mount.keys() & {"subPath", "subPathExpr"}
            used = re.findall(rf"{mount['mountPath']}/[\w./-]+", str({**container, "volumeMounts": []}))
            assert used
            assert all(path.startswith(f"{mount['mountPath']}/models") for path in used)


def test_pods_need_no_privilege(objects: list[Object]) -> None:
    for pod in pods(objects):
        assert not {"hostPID", "hostNetwork", "hostIPC"} & pod.keys()
        for container in pod["containers"]:
            assert "privileged" not in container.get("securityContext", {})


def test_every_image_has_a_version(objects: list[Object]) -> None:
    images = [c["image"] for pod in pods(objects) for c in pod["containers"] if "image" in c]
    assert all(re.search(r":v?\d[\w.-]*$", image) for image in images)


def test_a_claim_is_bound_to_its_volume() -> None:
    volume, claim, _ = read(K8S / "examples/volume.yaml")
    assert claim["spec"]["volumeName"] == volume["metadata"]["name"]
    assert volume["spec"]["claimRef"] == {k: claim["metadata"][k] for k in ("namespace", "name")}
    assert volume["spec"]["accessModes"] == claim["spec"]["accessModes"] == ["ReadOnlyMany"]
    assert volume["spec"]["storageClassName"] == claim["spec"]["storageClassName"] == ""
