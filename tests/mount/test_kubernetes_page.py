"""A user follows docs/kubernetes.md line by line, and ends with a loaded model; then updates, and removes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save

from tests import helm, kustomize
from tests.mount.harness import interpreter
from tests.mount.test_cluster_node import machine as machine
from tests.node import Node, Pod
from tests.origin import Origin
from tests.test_kubernetes import Object, only, validate

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/kubernetes.md").read_text()
COMMANDS = [
    line.removeprefix("$ ")
    for block in re.findall(r"^```console\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
]
LOAD = "import sys; from safetensors.numpy import load_file; print(load_file(sys.argv[1])['w'].sum())"


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin({"model.safetensors": save({"w": np.ones(1000, np.float32)})}) as own:
        yield own


class Cluster:
    """One of one node: does what the page's commands would, each checked as far as it can be."""

    def __init__(self, machine: Node, model: str) -> None:
        self._machine = machine
        self._model = model
        self._image = ""
        self._objects: list[Object] = []
        self.daemon: Pod | None = None

    def do(self, command: str) -> None:
        match shlex.split(command):
            case ["docker", "build", "--tag", tag, "."]:  # test_image.py does it
                self._image = tag
            case ["docker", "push", tag]:
                assert tag == self._image
            case ["kubectl", "apply", "-k", directory]:
                self._objects = kustomize.build(ROOT / directory)
                for found in self._objects:
                    validate(found)
                assert self._container()["image"] == self._image
                self._start()
            case ["kubectl", "-n", "modelfs", "rollout", "status", "daemonset/modelfs"]:
                assert self.daemon is not None
                self.daemon.await_ready()
            case ["kubectl", "-n", "modelfs", "set", "image", "daemonset/modelfs", image]:
                name, _, repository = image.partition("=")
                assert name == self._container()["name"]
                assert repository.partition(":")[0] == self._image.partition(":")[0]
                self._replace()
            case ["kubectl", "-n", "modelfs", "rollout", "undo", "daemonset/modelfs"]:
                self._replace()
            case ["kubectl", "delete", "-k", directory]:
                assert self.daemon is not None
                assert self._objects == kustomize.build(ROOT / directory)
                assert self.daemon.terminate() == 0
            case ["kubectl", "create", "namespace", name]:
                assert name == only(self._objects, "Namespace")["metadata"]["name"]
            case ["kubectl", "label", "namespace", name, label]:
                labels = only(self._objects, "Namespace", name)["metadata"]["labels"]
                assert label in [f"{key}={value}" for key, value in labels.items()]
            case ["helm", "install", "modelfs", chart, "--namespace", "modelfs", "--set", value]:
                assert value.startswith("image.repository=")
                values = {"image": {"repository": value.partition("=")[2]}}
                rendered = only(helm.render(ROOT / chart, values), "DaemonSet")["spec"]["template"]["spec"]
                assert rendered["containers"][0]["image"] == self._image
            case ["kubectl", "-n", "modelfs", "create", "secret", "generic", name, literal]:
                assert literal.startswith("--from-literal=")
                assert name in [each["secretRef"]["name"] for each in self._container()["envFrom"]]
            case _:
                raise AssertionError(f"{command}: nothing here does what it does")

    def _start(self) -> None:
        spec = only(self._objects, "DaemonSet")["spec"]["template"]["spec"]
        (name,) = [each["configMap"]["name"] for each in spec["volumes"] if "configMap" in each]
        settings = yaml.safe_load(only(self._objects, "ConfigMap", name)["data"]["config.yaml"])
        assert "finbert" in settings["models"]
        settings["models"]["finbert"] = self._model
        settings["cache"]["min_free"] = "0%"  # of this machine's disk
        self.daemon = self._machine.run(spec, {"config.yaml": yaml.safe_dump(settings)})

    def _container(self) -> Object:
        found: Object = only(self._objects, "DaemonSet")["spec"]["template"]["spec"]["containers"][0]
        return found

    def _replace(self) -> None:
        assert self.daemon is not None
        assert self.daemon.terminate() == 0
        self._start()


def test_the_page_line_by_line(machine: Node, origin: Origin) -> None:
    cluster = Cluster(machine, origin.url)
    (use,) = re.findall(r"^## Use it\n\n```yaml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    pod = yaml.safe_load(use)
    pod["containers"][0] |= {"command": ["sleep", "infinity"], "securityContext": {"runAsUser": 1000}}
    user = machine.run(pod)
    (model,) = re.findall(r"The model `finbert` is `(.*?)`", PAGE)
    python, env = interpreter("nobody")
    variables = [f"{name}={value}" for name, value in env.items()]
    loaded = 0
    for command in COMMANDS:
        cluster.do(command)
        if "rollout status" in command:
            said = user.exec("env", *variables, python, "-c", LOAD, f"{model}/model.safetensors")
            assert (said.stdout, said.stderr) == ("1000.0\n", "")
            loaded += 1
    assert loaded == 3
    assert COMMANDS[-1].startswith("kubectl delete")
    assert machine.mounts() == []
    assert "Permission denied" in user.exec("ls", model).stderr
    left = machine.root / "var/lib/modelfs/models"
    assert list(left.iterdir()) == []
    assert list((machine.root / "var/cache/modelfs").iterdir()) != []
