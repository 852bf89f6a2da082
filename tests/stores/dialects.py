"""How the API of each store writes a listing, so that one hostile list can be told to all of them.

A dialect makes the answers of a server out of rows, and the store that asks it. Rows are what the API calls
them: JSON objects, or texts for the stores that answer in XML.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import escape

from modelfs.stores import Store, open_store
from tests.stores.site import Answers, Reply, Request

SHA = "a" * 40
SHA256 = "b" * 64
DATE = "2025-07-01T12:00:00Z"

Documents = Mapping[str, Any]
"""Part of a URL → the answer there: bytes as they are, all else as JSON."""


def answering(documents: Documents) -> Answers:
    """Answer with the first of `documents` whose name the URL contains; HEADs without a body."""

    def answers(request: Request) -> Reply:
        for part, document in documents.items():
            if part in request.target:
                body = document if isinstance(document, bytes) else json.dumps(document).encode()
                kind = "text/html" if body.startswith(b"<html>") else "application/json"
                kind = "application/xml" if body.startswith(b"<?xml") else kind
                etag = f'"{hashlib.sha256(body).hexdigest()}"'
                return Reply(200, {"Connection": "close", "Content-Type": kind, "ETag": etag}, body)
        return Reply(404, {"Connection": "close"})

    return answers


@dataclass(frozen=True)
class Dialect:
    """One API.

    Attributes:
        name: of the kind of store.
        store: makes the store that asks the server at a URL, which ends with a slash.
        row: of a listing, for a path and a size; a size may be anything.
        documents: what the server answers, for the rows of a listing.
        size_fault: what is said about sizes that cannot be, a regular expression.
        text: whether the answers are JSON, where everything may stand in the place of everything.
        unable: paths that it cannot write, or that mean something else in it, by their names in `PATHS`.

    """

    name: str
    store: Callable[[str], Store]
    row: Callable[[str, Any], Any]
    documents: Callable[[Sequence[Any]], Documents]
    size_fault: str
    text: bool = True
    unable: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return self.name


def oci_manifest(*layers: Any, **more: Any) -> dict[str, Any]:
    return {"schemaVersion": 2, "layers": list(layers), **more}


def oci_layer(path: Any, size: Any, **more: Any) -> dict[str, Any]:
    return {
        "mediaType": "application/vnd.cncf.model.weight.v1.raw",
        "digest": f"sha256:{SHA256}",
        "size": size,
        "annotations": {"org.cncf.model.filepath": path},
        **more,
    }


def _github(rows: Sequence[Any]) -> Documents:
    return {"/assets": list(rows), "/releases/": {"id": 7}}


def _github_row(path: str, size: Any) -> dict[str, Any]:
    return {"id": 1, "name": path, "size": size, "updated_at": DATE, "state": "uploaded", "digest": None}


def _hub_row(path: str, size: Any) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": size, "oid": SHA}


def _hub_lfs_row(path: str, size: Any) -> dict[str, Any]:
    return {**_hub_row(path, 1), "lfs": {"oid": SHA256, "size": size, "pointerSize": 100}}


def _hub_store(url: str) -> Store:
    return open_store("hf://o/n", {"endpoint": url.rstrip("/")})


def _hub(rows: Sequence[Any]) -> Documents:
    return {"/tree/": list(rows), "/api/models/": {"id": "o/n", "sha": SHA, "lastModified": DATE}}


MLFLOW_WHERE = {
    "registered-models/alias": {"model_version": {"version": "7"}},
    "get-download-uri": {"artifact_uri": "mlflow-artifacts:/1"},
}


def _mlflow(rows: Sequence[Any]) -> Documents:
    return {**MLFLOW_WHERE, "mlflow-artifacts/artifacts?path=1": {"files": list(rows)}}


def _s3_row(path: str, size: Any) -> str:
    return (
        f"<Contents><Key>m/{escape(path)}</Key><LastModified>{DATE}</LastModified>"
        f"<ETag>&quot;{SHA}&quot;</ETag><Size>{escape(str(size))}</Size></Contents>"
    )


def _s3(rows: Sequence[str]) -> Documents:
    listing = f"<IsTruncated>false</IsTruncated>{''.join(rows)}"
    return {
        "list-type": f'<?xml version="1.0"?><ListBucketResult>{listing}</ListBucketResult>'.encode(),
        "/": b"",
    }


def _gs_row(path: str, size: Any) -> dict[str, Any]:
    return {"name": f"m/{path}", "size": size, "generation": "1", "timeCreated": DATE, "crc32c": "AAAAAA=="}


def _az_row(path: str, size: Any) -> str:
    name = escape(f"m/{path}")
    if not name.isprintable():  # https://learn.microsoft.com/rest/api/storageservices/list-blobs: Encoded
        name = quote(f"m/{path}")
    encoded = ' Encoded="true"' if "%" in name else ""
    return (
        f"<Blob><Name{encoded}>{name}</Name><Properties><Etag>0x1</Etag>"
        f"<Last-Modified>Wed, 21 Oct 2015 07:28:00 GMT</Last-Modified>"
        f"<Content-Length>{escape(str(size))}</Content-Length><BlobType>BlockBlob</BlobType>"
        "</Properties></Blob>"
    )


def _az(rows: Sequence[str]) -> Documents:
    blobs = f"<Blobs>{''.join(rows)}</Blobs><NextMarker/>"
    return {"comp=list": f'<?xml version="1.0"?><EnumerationResults>{blobs}</EnumerationResults>'.encode()}


def _site_row(path: str, size: Any) -> dict[str, Any]:
    return {"path": path, "size": size, "etag": f'"{SHA}"'}


NAMES_ONLY = frozenset({"absolute", "up later", "dot inside", "empty component", "deep"})
"""What has a slash is no name of a child, for the APIs that list one directory at a time."""

_SIZE = "makes no sense|is negative|no file can be so large"
_HUB_SIZE = f"not a Hub's|{_SIZE}"

DIALECTS = (
    Dialect(
        "manifest",
        lambda url: open_store(url, {}),
        _site_row,
        lambda rows: {"modelfs-manifest.json": {"version": 1, "files": list(rows)}},
        "size must be a number of bytes",
    ),
    Dialect(
        "oci",
        lambda url: open_store(f"oci://{url.split('/')[2]}/m:v1", {}),
        oci_layer,
        lambda rows: {"/manifests/": oci_manifest(*rows)},
        "no usable size",
        unable=frozenset({"empty"}),
    ),
    Dialect(
        "github",
        lambda url: open_store("github://o/r@v1", {"api_url": url.rstrip("/")}),
        _github_row,
        _github,
        "malformed id, name, size or date",
    ),
    Dialect("hf", _hub_store, _hub_row, _hub, _HUB_SIZE),
    Dialect("hf-lfs", _hub_store, _hub_lfs_row, _hub, _HUB_SIZE),
    Dialect(
        "kaggle",
        lambda url: open_store("kaggle://o/m/f/v/1", {"endpoint": url.rstrip("/")}),
        lambda path, size: {"name": path, "size": size, "creationDate": DATE},
        lambda rows: {"/files": {"files": list(rows)}},
        "malformed name or size",
    ),
    Dialect(
        "mlflow",
        lambda url: open_store("mlflow://models/m@a", {"tracking_uri": url.rstrip("/")}),
        lambda path, size: {"path": path, "is_dir": False, "file_size": size},
        _mlflow,
        "has no file_size",
        unable=NAMES_ONLY,
    ),
    Dialect(
        "gs",
        lambda url: open_store("gs://models-of-ours/m", {"endpoint": url.rstrip("/"), "anonymous": True}),
        _gs_row,
        lambda rows: {"/b/": {"items": list(rows)}},
        _SIZE,
        unable=frozenset({"empty"}),
    ),
    Dialect(
        "s3",
        lambda url: open_store(
            "s3://bucket/m", {"endpoint_url": url.rstrip("/"), "anonymous": True, "region": "eu-west-1"}
        ),
        lambda path, size: _s3_row(quote(path, safe="/", errors="surrogatepass"), size),
        lambda rows: {
            name: body.replace(b"<IsTruncated>", b"<EncodingType>url</EncodingType><IsTruncated>")
            for name, body in _s3(rows).items()
        },
        f"not S3's|{_SIZE}",
        text=False,
        unable=frozenset({"empty", "no text"}),
    ),
    Dialect(
        "az",
        lambda url: open_store("az://ours/models/m", {"endpoint": url.rstrip("/"), "anonymous": True}),
        _az_row,
        _az,
        _SIZE,
        text=False,
        unable=frozenset({"empty", "no text"}),
    ),
)
