"""A directory as a model on the web, with manifest, ETags and ranges: for `modelfs.testing.server`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from modelfs.testing.server import Application

MANIFEST = "modelfs-manifest.json"
_PIECE = 1 << 20


def directory(path: str) -> Application:
    """Return the application that serves the files in `path`, which do not change."""
    files = {file.name: file for file in Path(path).iterdir()}
    tags = {name: f'"{_sha256(file)}"' for name, file in files.items()}
    rows = [{"path": name, "size": files[name].stat().st_size, "etag": tag} for name, tag in tags.items()]
    manifest = json.dumps({"version": 1, "files": rows}).encode()

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        name = environ["PATH_INFO"].lstrip("/")
        if name == MANIFEST:
            start_response("200 OK", [("Content-Length", str(len(manifest)))])
            return [manifest]
        file, tag = files.get(name), tags.get(name, "")
        if file is None or environ.get("HTTP_IF_MATCH", tag) != tag:
            start_response("404 Not Found" if file is None else "412 Precondition Failed", [])
            return []
        size = file.stat().st_size
        start, stop, status, headers = 0, size, "200 OK", [("ETag", tag), ("Accept-Ranges", "bytes")]
        if match := re.fullmatch(r"bytes=(\d+)-(\d+)", environ.get("HTTP_RANGE", "")):
            start, stop, status = int(match[1]), min(int(match[2]) + 1, size), "206 Partial Content"
            headers.append(("Content-Range", f"bytes {start}-{stop - 1}/{size}"))
        start_response(status, [*headers, ("Content-Length", str(stop - start))])
        return _pieces(file, start, stop)

    return answer


def _pieces(file: Path, start: int, stop: int) -> Iterator[bytes]:
    with file.open("rb") as content:
        content.seek(start)
        while start < stop:
            piece = content.read(min(_PIECE, stop - start))
            start += len(piece)
            yield piece


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
