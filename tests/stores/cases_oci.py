"""The stores of container registries, on Debian's docker-registry."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from modelfs.stores.oci import OciStore
from tests.stores.case import FILES, Case, Opened
from tests.stores.registry import PASSWORD, USER, Repository, docker_config, docker_registry, with_password

TITLE = "org.opencontainers.image.title"
FILEPATH = "org.cncf.model.filepath"


@contextmanager
def oras(directory: Path) -> Iterator[Opened]:
    """Files as ``oras push`` makes them."""
    pushed = Repository("team/model")
    layers = [
        pushed.blob(data, "application/vnd.oci.image.layer.v1.tar", {TITLE: path})
        for path, data in FILES.items()
    ]
    pushed.manifest("v1", layers)
    with docker_registry(directory) as url:
        pushed.push(url)
        yield OciStore(f"oci://{url.split('/')[2]}/team/model:v1", {}), pushed.files("v1", FILES)


@contextmanager
def private_index(directory: Path) -> Iterator[Opened]:
    """A directory of a ModelPack behind a password, in an index that is pinned by its digest."""
    pushed = Repository("team/model")
    layers = [
        pushed.blob(data, "application/vnd.cncf.model.weight.v1.raw", {FILEPATH: f"models/x/{path}"})
        for path, data in FILES.items()
    ]
    layers.append(pushed.blob(b"beside", "application/vnd.cncf.model.doc.v1.raw", {FILEPATH: "README.md"}))
    model = pushed.manifest("inner", layers) | {"platform": {"os": "unknown", "architecture": "unknown"}}
    pushed.index("v1", [model])
    auths = {"auths": {"REGISTRY": {"username": USER, "password": PASSWORD}}}
    with pytest.MonkeyPatch.context() as patch, docker_registry(directory, **with_password(directory)) as url:
        pushed.push(url, (USER, PASSWORD))
        host = url.split("/")[2]
        auths["auths"][host] = auths["auths"].pop("REGISTRY")
        patch.setenv("DOCKER_CONFIG", str(docker_config(directory / "docker", auths)))
        store = OciStore(f"docker://{host}/team/model@{pushed.digest('v1')}", {"path": "/models/x"})
        yield store, FILES


CASES = [
    Case("oci-oras", oras),
    Case("oci-private-index", private_index, secrets=(PASSWORD,)),
]
