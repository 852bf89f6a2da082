"""Container registries of the tests: Debian's docker-registry, and one whose answers a test may bend."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.stores.site import HOST, Answers, Reply, Request, file_reply

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
EMPTY = "application/vnd.oci.empty.v1+json"

USER, PASSWORD = "robot", "pa55-word-canary"
_HTPASSWD = f"{USER}:$2b$04$Mv.RKe5CVFgrnvwbr8X9QuN3zNcV87AulQmfSmzsPxFciuQhqC22K\n"

_CONFIG = """
version: 0.1
log: {accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: %s}}
http: {addr: "127.0.0.1:0", secret: none}
"""


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class Repository:
    """What a test pushes to one repository; also answers for it like a registry without authentication."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, tuple[str, bytes]] = {}

    def blob(self, data: bytes, media_type: str, annotations: Mapping[str, str] = {}, **more: Any) -> Any:
        """Add a blob and return its descriptor."""
        self.blobs[sha256(data)] = data
        noted = {"annotations": dict(annotations)} if annotations else {}
        return {"mediaType": media_type, "digest": sha256(data), "size": len(data), **noted, **more}

    def manifest(self, tag: str, layers: list[Any], config: Any = None, **more: Any) -> Any:
        """Add a manifest and return its descriptor."""
        config = config or self.blob(b"{}", EMPTY)
        document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers, **more}
        return self._add(tag, OCI_MANIFEST, document)

    def index(self, tag: str, manifests: list[Any], **more: Any) -> Any:
        """Add an index and return its descriptor."""
        return self._add(
            tag, OCI_INDEX, {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests, **more}
        )

    def _add(self, tag: str, media_type: str, document: Any) -> Any:
        data = json.dumps(document, indent=1).encode()
        self.manifests[tag] = self.manifests[sha256(data)] = media_type, data
        return {"mediaType": media_type, "digest": sha256(data), "size": len(data)}

    def digest(self, tag: str) -> str:
        return sha256(self.manifests[tag][1])

    def files(self, tag: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
        """Return `files` and what else the snapshot of a manifest shows."""
        data = self.manifests[tag][1]
        config = self.blobs[json.loads(data)["config"]["digest"]]
        return {**files, ".oci/manifest.json": data, ".oci/config.json": config}

    def push(self, url: str, auth: tuple[str, str] | None = None) -> None:
        """Push everything to a registry: blobs, then manifests, children before their index."""
        with httpx.Client(auth=auth, base_url=f"{url}v2/{self.name}/") as client:
            for digest, data in self.blobs.items():
                upload = client.post("blobs/uploads/").raise_for_status().headers["location"]
                target = httpx.URL(upload).copy_merge_params({"digest": digest})
                client.put(target, content=data).raise_for_status()
            for reference, (media_type, data) in self.manifests.items():
                headers = {"content-type": media_type}
                client.put(f"manifests/{reference}", content=data, headers=headers).raise_for_status()

    def write_layout(self, directory: Path, tag: str) -> None:
        """Write the manifest `tag` and its blobs as an OCI image layout."""
        blobs = directory / "blobs" / "sha256"
        blobs.mkdir(parents=True)
        media_type, manifest = self.manifests[tag]
        for digest, data in {**self.blobs, sha256(manifest): manifest}.items():
            (blobs / digest.partition(":")[2]).write_bytes(data)
        (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        row = {"mediaType": media_type, "digest": sha256(manifest), "size": len(manifest)}
        named = row | {"annotations": {"org.opencontainers.image.ref.name": tag}}
        (directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [named]}))

    def answer(self, request: Request) -> Reply:
        """Answer like a good registry."""
        kind, _, reference = request.target.removeprefix(f"/v2/{self.name}/").partition("/")
        if kind == "manifests" and reference in self.manifests:
            media_type, data = self.manifests[reference]
            headers = {"Content-Type": media_type, "Docker-Content-Digest": sha256(data)}
            return Reply(200, headers, data)
        if kind == "blobs" and reference in self.blobs:
            return file_reply(self.blobs[reference], request)
        return Reply(404)


def with_tokens(inner: Answers, realm: str, tokens: set[str], scheme: str = "Bearer") -> Answers:
    """Let only those through who bring one of `tokens`; others are sent to `realm`."""

    def answer(request: Request) -> Reply:
        if request.headers.get("authorization") in {f"{scheme} {token}" for token in tokens}:
            return inner(request)
        challenge = f'{scheme} realm="{realm}",service="registry.test",scope="repository:team/model:pull"'
        return Reply(401, {"WWW-Authenticate": challenge})

    return answer


@contextmanager
def docker_registry(directory: Path, **settings: str) -> Iterator[str]:
    """Run Debian's registry on a free port with its files in `directory`; yield its URL.

    Args:
        directory: to use.
        settings: variables that override its configuration (``REGISTRY_AUTH_HTPASSWD_REALM`` …).

    """
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("docker-registry is not installed")
    config = directory / "registry.yml"
    config.write_text(_CONFIG % (directory / "registry"))
    command, env = [program, "serve", str(config)], {**os.environ, **settings}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as child:
        assert child.stderr is not None
        try:
            lines = iter(child.stderr.readline, "")
            told = (re.search(r"listening on [^ ]*:(\d+)", line) for line in lines)
            found = next(filter(None, told), None)
            assert found, "docker-registry ended before it listened"
            drain = threading.Thread(target=child.stderr.read)
            drain.start()
            yield f"http://{HOST}:{found[1]}/"
        finally:
            child.terminate()
    drain.join()


def with_password(directory: Path) -> dict[str, str]:
    """Return the settings of a registry that only opens to USER and PASSWORD."""
    file = directory / "htpasswd"
    file.write_text(_HTPASSWD)
    return {
        "REGISTRY_AUTH": "htpasswd",
        "REGISTRY_AUTH_HTPASSWD_REALM": "test",
        "REGISTRY_AUTH_HTPASSWD_PATH": str(file),
    }


def docker_config(directory: Path, document: Any) -> Path:
    """Write Docker's configuration and return its directory, for ``DOCKER_CONFIG``."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(document))
    return directory
