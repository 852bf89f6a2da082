"""Models in a container registry, mounted: loaded as they are, cached once however they are packed."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable, Mapping
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import numpy
import pytest
import zstandard
from safetensors.numpy import save

from modelfs.testing.hub import HubServer
from tests.archives.packing import tarred
from tests.mount.harness import mounted
from tests.stores.registry import (
    PASSWORD,
    USER,
    Repository,
    docker_config,
    docker_registry,
    with_password,
)
from tests.stores.site import scripted

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


CHUNK = 4 * 1024 * 1024


def estargz(tar: bytes) -> bytes:
    """Return a layer packed for lazy pulling: of gzip members, with a list of its files at the end.

    https://github.com/containerd/stargz-snapshotter, ``docs/estargz.md``.
    """
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        files = archive.getmembers()
    ends = [file.offset_data + file.size for file in files]
    chunks = {
        start: file
        for file, end in zip(files, ends, strict=True)
        for start in range(file.offset_data, end, CHUNK)
    }
    blob, entries = b"", []
    for start, stop in pairwise(sorted({0, *chunks, *ends, -(-ends[-1] // 512) * 512})):
        if file := chunks.get(start):
            row = {"name": file.name, "type": "reg" if start == file.offset_data else "chunk"}
            size = 0 if stop in ends else stop - start  # of the last one it is not told
            place = {"offset": len(blob), "chunkOffset": start - file.offset_data, "chunkSize": size}
            told = f"sha256:{sha256(tar[start:stop]).hexdigest()}"
            entries.append({**row, **place, "size": file.size, "chunkDigest": told})
        blob += gzip.compress(tar[start:stop], 1)
    toc = tarred({"stargz.index.json": json.dumps({"version": 1, "entries": entries}).encode()})
    header = b"\x1f\x8b\x08\x04" + bytes(5) + b"\xff" + b"\x1a\x00SG\x16\x00%016xSTARGZ" % len(blob)
    return blob + gzip.compress(toc) + header + b"\x01\x00\x00\xff\xff" + bytes(8)


LAYERS: Mapping[str, tuple[tuple[str, Callable[[bytes], bytes]], ...]] = {
    "plain": (("application/vnd.oci.image.layer.v1.tar", bytes),) * 3,
    "packed": (
        ("application/vnd.docker.image.rootfs.diff.tar.gzip", gzip.compress),
        ("application/vnd.oci.image.layer.v1.tar+gzip", estargz),
        ("application/vnd.oci.image.layer.v1.tar+zstd", zstandard.compress),
    ),
}
"""Media types of the layers of an image, and what makes each of a tar."""


@pytest.mark.parametrize(
    ("transport", "kind"),  # what is in an image does not depend on the transport
    [*(("kernel", kind) for kind in LAYERS), ("pyfuse3", "packed")],
)
def test_an_image_is_shown_as_its_file_system(place: Path, transport: str, kind: str) -> None:
    pushed = Repository("team/image")
    contents = [
        {"etc/os-release": b"ID=none", "models/config.json": b"old", "models/dropped.bin": bytes(1000)},
        {
            ".no.prefetch.landmark": b"\x0f",
            "models/model.safetensors": WEIGHTS,
            "models/.wh.dropped.bin": b"",
        },
        {"models/config.json": b"new", "models/sub/vocab.txt": b"words"},
    ]
    layers = [
        pushed.blob(pack(tarred(files)), media_type)
        for files, (media_type, pack) in zip(contents, LAYERS[kind], strict=True)
    ]
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


def test_a_packed_layer_is_verified_before_a_name_of_it_is_shown(place: Path) -> None:
    pushed = Repository("team/image")
    true = gzip.compress(tarred({"models/config.json": b"{}"}), mtime=1)
    pushed.manifest("v1", [pushed.blob(true, "application/vnd.oci.image.layer.v1.tar+gzip")])
    pushed.blobs[f"sha256:{sha256(true).hexdigest()}"] = true[:4] + b"\2" + true[5:]  # of its time
    with scripted(pushed.answer) as (url, _):
        source = f"oci://{urlsplit(url).netloc}/team/image:v1"
        with mounted(place, sources={"m": source}) as mount:
            mount.allowed_errors.append("do not have the published digest")
            with pytest.raises(OSError, match="Input/output error"):
                (mount.path / "m/models/config.json").read_bytes()
            (state,) = mount.status()["models"][0]["archives"]
            assert state["state"] == "failed"
            assert "do not have the published digest" in state["why"]
            assert state["members"] == 0


def tree(root: Path) -> dict[str, bytes]:
    """Return all files below `root`."""
    return {
        os.path.relpath(os.path.join(base, name), root): Path(base, name).read_bytes()
        for base, _, names in os.walk(root)
        for name in names
    }
