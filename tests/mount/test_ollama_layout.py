"""Models packed for Ollama, from a registry, in the layout that Ollama looks for below ``OLLAMA_MODELS``."""

from __future__ import annotations

import json
import os
import random
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

from tests.mount.harness import alone, eventually, mounted
from tests.stores.registry import Repository, docker_registry

KIND = "application/vnd.ollama.image."
WEIGHTS = random.Random(5).randbytes(3_000_000)


def pushed_model(weights: bytes) -> Repository:
    pushed = Repository("library/tiny")
    layers = [
        pushed.blob(weights, f"{KIND}model"),
        pushed.blob(b"{{ .Prompt }}", f"{KIND}template"),
        pushed.blob(b'{"stop": ["</s>"]}', f"{KIND}params"),
    ]
    config = pushed.blob(b'{"model_format": "gguf"}', "application/vnd.docker.container.image.v1+json")
    pushed.manifest("1b", layers, config)
    pushed.manifest("image", [pushed.blob(b"x", "application/octet-stream")])
    return pushed


def models_in(directory: Path) -> dict[str, dict[str, bytes]]:
    """Find models as Ollama does: manifests four levels deep, then the blobs they name, checked."""
    found: dict[str, dict[str, bytes]] = {}
    for path in (directory / "manifests").glob("*/*/*/*"):
        manifest = json.loads(path.read_text())
        own = found[str(path.relative_to(directory / "manifests"))] = {}
        for row in [manifest["config"], *manifest["layers"]]:
            own[row["mediaType"]] = (directory / "blobs" / row["digest"].replace(":", "-")).read_bytes()
            assert f"sha256:{sha256(own[row['mediaType']]).hexdigest()}" == row["digest"]
    return found


def test_artifacts_lie_as_ollama_expects_them(place: Path, transport: str) -> None:
    pushed = pushed_model(WEIGHTS)
    with docker_registry(place) as url:
        pushed.push(url)
        host = urlsplit(url).netloc
        sources = {
            name: f"oci://{host}/library/tiny:{tag}" for name, tag in (("tiny", "1b"), ("image", "image"))
        }
        with mounted(
            place, "--refresh", "0", sources=sources, env=alone(place), transport=transport
        ) as mount:
            models = mount.path / ".ollama" / "models"
            assert sorted(os.listdir(models)) == ["blobs", "manifests", "manifests-v2"]
            shown = models_in(models)
            assert list(shown) == [f"{host}/library/tiny/1b"]
            assert shown[f"{host}/library/tiny/1b"][f"{KIND}model"] == WEIGHTS
            fetched = mount.fetched()
            assert (mount.path / "tiny" / "model.gguf").read_bytes() == WEIGHTS
            assert mount.fetched() == fetched

            blob = models / "blobs" / f"sha256-{sha256(WEIGHTS).hexdigest()}"
            with blob.open("rb") as file:
                pushed_model(WEIGHTS[::-1]).push(url)
                mount.cli("refresh", str(mount.path))
                eventually(lambda: not blob.exists())
                assert models_in(models)[f"{host}/library/tiny/1b"][f"{KIND}model"] == WEIGHTS[::-1]
                if transport == "kernel":
                    numbers = {path: path.stat().st_ino for path in sorted(models.rglob("*"))}
                    mount.cli("upgrade", str(mount.path))
                    eventually(lambda: mount.status()["handovers"] == 1)
                    assert {path: path.stat().st_ino for path in sorted(models.rglob("*"))} == numbers
                assert file.read() == WEIGHTS
