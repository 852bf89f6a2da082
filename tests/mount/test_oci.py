"""Models in a container registry, mounted: loaded as they are, cached once however they are packed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

import numpy
import pytest
from safetensors.numpy import save

from modelfs.testing.hub import HubServer
from tests.mount.harness import mounted
from tests.stores.registry import (
    PASSWORD,
    USER,
    Repository,
    docker_config,
    docker_registry,
    packed,
    with_password,
)

FILEPATH = "org.cncf.model.filepath"
WEIGHTS = save({"w": numpy.arange(3_000_000, dtype=numpy.float32)})
LOAD = "import sys; from safetensors.numpy import load_file; print(int(load_file(sys.argv[1])['w'][-1]))"


def test_a_private_artifact_is_loaded_and_shared_with_other_stores(place: Path, transport: str) -> None:
    pushed = Repository("team/model")
    raw = "application/vnd.cncf.model.weight.v1.raw"
    layers = [
        pushed.blob(WEIGHTS, raw, {FILEPATH: "model.safetensors"}),
        pushed.blob(b"{}", "application/vnd.cncf.model.weight.config.v1.raw", {FILEPATH: "config.json"}),
    ]
    pushed.manifest("v1", layers)
    pushed.manifest("runner", [pushed.blob(WEIGHTS, "application/vnd.docker.ai.safetensors")])
    with docker_registry(place, **with_password(place)) as url, HubServer() as hub:
        hub.add("org/name", {"model.safetensors": WEIGHTS})
        pushed.push(url, (USER, PASSWORD))
        host = urlsplit(url).netloc
        docker = docker_config(place / "docker", {"auths": {host: {"username": USER, "password": PASSWORD}}})
        sources = {
            "pack": f"oci://{host}/team/model:v1",
            "runner": f"docker://{host}/team/model:runner",
            "hub": "hf://org/name",
        }
        env = {**hub.env(), "DOCKER_CONFIG": str(docker)}
        with mounted(place, sources=sources, env=env, transport=transport) as mount:
            assert mount.python(LOAD, str(mount.path / "pack/model.safetensors")).strip() == "2999999"
            assert (mount.path / "pack/config.json").read_bytes() == b"{}"
            fetched = mount.fetched()
            for name in ("runner", "hub"):
                data = (mount.path / name / "model.safetensors").read_bytes()
                assert sha256(data).digest() == sha256(WEIGHTS).digest()
            assert mount.fetched() == fetched
            assert PASSWORD not in mount.log.read_text() + mount.cli("status", str(mount.path)).stdout


LAYERS: Mapping[str, Callable[[bytes], bytes]] = {
    "application/vnd.oci.image.layer.v1.tar": bytes,
}
"""Media types of layers, and what makes them of a tar."""


@pytest.mark.parametrize("media_type", LAYERS, ids=lambda media_type: media_type.rpartition(".")[2])
def test_an_image_is_shown_as_its_file_system(place: Path, transport: str, media_type: str) -> None:
    pushed = Repository("team/image")
    contents = [
        {"etc/os-release": b"ID=none", "models/config.json": b"old", "models/dropped.bin": bytes(1000)},
        {"models/model.safetensors": WEIGHTS, "models/.wh.dropped.bin": b""},
        {"models/config.json": b"new", "models/sub/vocab.txt": b"words"},
    ]
    layers = [pushed.blob(LAYERS[media_type](packed(files)), media_type) for files in contents]
    pushed.manifest("v1", layers)
    models = {"config.json": b"new", "model.safetensors": WEIGHTS, "sub/vocab.txt": b"words"}
    with docker_registry(place) as url:
        pushed.push(url)
        source = f"oci://{urlsplit(url).netloc}/team/image:v1"
        part = {"source": source, "options": {"path": "/models"}}
        config = json.dumps({"models": {"all": source, "models": part}})
        with mounted(place, config=config, transport=transport) as mount:
            assert mount.python(LOAD, str(mount.path / "models/model.safetensors")).strip() == "2999999"
            assert tree(mount.path / "models") == models
            assert not (mount.path / "all/models/dropped.bin").exists()
            whole = tree(mount.path / "all")
            assert {path for path in whole if path.startswith(".oci/")} == {
                ".oci/config.json",
                ".oci/manifest.json",
            }
            inside = {f"models/{path}": data for path, data in models.items()}
            shown = {path: data for path, data in whole.items() if not path.startswith(".oci/")}
            assert shown == {"etc/os-release": b"ID=none", **inside}
    with mounted(place, config=config, transport=transport) as mount:  # the registry is gone
        assert tree(mount.path / "models") == models


def tree(root: Path) -> dict[str, bytes]:
    """Return all files below `root`."""
    return {
        os.path.relpath(os.path.join(base, name), root): Path(base, name).read_bytes()
        for base, _, names in os.walk(root)
        for name in names
    }
