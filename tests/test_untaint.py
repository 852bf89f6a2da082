"""The startup taint is taken off the node, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import httpx
import pytest

FILE = Path(__file__).parents[1] / "packaging/container/modelfs-untaint"
TAINT = {"key": "startup-taint.cluster-autoscaler.kubernetes.io/modelfs", "effect": "NoSchedule"}
OTHER = {"key": "nvidia.com/gpu", "effect": "NoSchedule", "value": "present"}


@pytest.fixture(scope="module")
def program() -> Any:
    loader = SourceFileLoader("modelfs_untaint", str(FILE))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


class Node:
    """A node as the API has it: a patch that names another version than the present one is refused."""

    def __init__(self, taints: list[dict[str, str]], changed: Callable[[], None] = lambda: None) -> None:
        self.taints, self.version, self.patches, self.changed = taints, 1, 0, changed

    def answer(self, request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/api/v1/nodes/worker-1"
        if request.method == "PATCH":
            assert request.headers["Content-Type"] == "application/merge-patch+json"
            self.patches += 1
            asked = json.loads(request.content)
            if asked["metadata"]["resourceVersion"] != str(self.version):
                return httpx.Response(409)
            self.taints, self.version = asked["spec"]["taints"], self.version + 1
        spec = {"taints": list(self.taints)} if self.taints else {}
        found = {"metadata": {"name": "worker-1", "resourceVersion": str(self.version)}, "spec": spec}
        response = httpx.Response(200, json=found)
        self.changed()
        return response

    def client(self) -> httpx.Client:
        return httpx.Client(transport=httpx.MockTransport(self.answer), base_url="https://api")


def test_only_our_taint_goes(program: Any) -> None:
    node = Node([OTHER, TAINT])
    with node.client() as api:
        assert program.untaint(api, "worker-1", TAINT["key"])
    assert node.taints == [OTHER]


def test_a_node_without_it_is_not_touched(program: Any) -> None:
    for taints in ([], [OTHER]):
        node = Node(taints)
        with node.client() as api:
            assert program.untaint(api, "worker-1", TAINT["key"])
        assert (node.taints, node.patches) == (taints, 0)


def test_a_change_by_somebody_else_is_kept(program: Any) -> None:
    node = Node([TAINT])

    def once() -> None:
        node.changed = lambda: None
        node.taints, node.version = [TAINT, OTHER], 2

    node.changed = once
    with node.client() as api:
        assert not program.untaint(api, "worker-1", TAINT["key"])
        assert node.taints == [TAINT, OTHER]
        assert program.untaint(api, "worker-1", TAINT["key"])
    assert node.taints == [OTHER]


def test_a_refusal_is_an_error(program: Any) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(403))
    with (
        httpx.Client(transport=transport, base_url="https://api") as api,
        pytest.raises(httpx.HTTPStatusError),
    ):
        program.untaint(api, "worker-1", TAINT["key"])


def test_a_directory_that_is_no_mount_does_not_count(program: Any, tmp_path: Path) -> None:
    assert not program.answers(tmp_path)
    assert not program.answers(tmp_path / "missing")
