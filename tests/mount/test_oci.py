"""Models in a container registry, mounted: loaded as they are, cached once however they are packed."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

import numpy
from safetensors.numpy import save

from modelfs.testing.hub import HubServer
from tests.mount.harness import mounted
from tests.stores.registry import PASSWORD, USER, Repository, docker_config, docker_registry, with_password

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
