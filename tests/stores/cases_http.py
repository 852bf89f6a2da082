"""Web servers: single files, manifests and index pages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from modelfs.stores import open_store
from tests.stores.case import FILES, Case, Opened, write_tree
from tests.stores.site import Reply, Request, file_reply, nginx, python_server, scripted

# nginx does not list names with a leading dot.
VISIBLE = {path: data for path, data in FILES.items() if not path.startswith(".")}
SECRET = "s3cr3t-t0ken"


@contextmanager
def index_by_python(directory: Path) -> Iterator[Opened]:
    with python_server(write_tree(directory)) as url:
        yield open_store(url), FILES


@contextmanager
def index_by_nginx(directory: Path) -> Iterator[Opened]:
    write_tree(directory / "www")
    with nginx(directory / "www", directory) as url:
        yield open_store(url), VISIBLE


@contextmanager
def manifest_on_nginx(directory: Path) -> Iterator[Opened]:
    root = write_tree(directory / "www" / "model")
    files = [
        {"path": path, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for path, data in FILES.items()
    ]
    files[0] |= {"path": "renamed/config.json", "url": "config.json"}
    (root / "modelfs-manifest.json").write_text(json.dumps({"version": 1, "files": files}))
    expected = {"renamed/config.json" if path == "config.json" else path: FILES[path] for path in FILES}
    with nginx(directory / "www", directory) as url:
        yield open_store(f"{url}model/"), expected


@contextmanager
def single_with_secrets(directory: Path) -> Iterator[Opened]:
    name, data = "weights v1 100%.bin", FILES["model.safetensors"]

    def answers(request: Request) -> Reply:
        if request.headers.get("authorization") != f"Bearer {SECRET}":
            return Reply(401)
        if request.target != f"/{quote(name)}?signature={SECRET}":
            return Reply(404)
        return file_reply(data, request)

    with scripted(answers) as (url, _):
        options = {"headers": {"Authorization": f"Bearer {SECRET}"}}
        yield open_store(f"{url}{quote(name)}?signature={SECRET}", options), {name: data}


CASES = [
    Case("http-index-python", index_by_python),
    Case("http-index-nginx", index_by_nginx),
    Case("http-manifest", manifest_on_nginx),
    Case("http-single", single_with_secrets, (SECRET,)),
]
