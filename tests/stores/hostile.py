"""A corpus of manifests and listings that must not be shown, or not all of them: each with what is said."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from modelfs.stores import open_store
from tests.stores.dialects import (
    DATE,
    DIALECTS,
    MLFLOW_WHERE,
    SHA,
    SHA256,
    Dialect,
    Documents,
    oci_layer,
    oci_manifest,
)

PATHS = {
    "absolute": ("/etc/passwd", "''"),
    "up": ("..", "'..'"),
    "up later": ("model/../../evil", "'..'"),
    "dot": (".", "'.'"),
    "dot inside": ("model/./evil", "'.'"),
    "empty": ("", "empty"),
    "empty component": ("model//evil", "''"),
    "NUL": ("config.json\0.txt", "control character"),
    "newline": ("a\nb", "control character"),
    "escape": ("\x1b[2J", "control character"),
    "delete": ("a\x7f", "control character"),
    "long": ("m" * 256, "longer than 255"),
    "long in bytes": ("\u00e4" * 128, "longer than 255"),
    "deep": ("d/" * 3000 + "x", "longer than 4095"),
    "no text": ("a\ud800b", "not valid text"),
}
"""Paths that nothing may have, and what is said about them."""

SIZES: dict[str, Any] = {
    "negative": -1,
    "too large for a file": 1 << 63,
    "of 4000 digits": int("9" * 4000),
    "of 10000 digits": "9" * 10_000,
    "not a number": float("nan"),
    "infinite": float("inf"),
    "words": "many",
    "null": None,
    "a list": [1],
    "an object": {"bytes": 1},
}
"""What no size can be."""


BODIES = {
    "nothing": b"",
    "a page": b"<html>not found</html>",
    "cut short": b'{"files": [{"path": "a"',
    "null": b"null",
    "a number": b"7",
    "a text": b'"files"',
    "lists in lists": b"[" * 100_000,
    "objects in objects": b'{"a":' * 100_000,
    "a number of 100,000 digits": b"1" * 100_000,
    "no UTF-8": b"\xff\xfe\x00",
    "a list of null": b"[null]",
    "a list of lists": b"[[]]",
    "an object of nonsense": b'{"files": 7, "items": 7, "layers": 7, "schemaVersion": 2, "version": 1}',
}
"""Answers that are not what any API would say."""

XML = '<?xml version="1.0"?>'
DOCUMENTS = {
    "nothing": "",
    "a page": "<html>not found</html>",
    "cut short": f"{XML}<ListBucketResult><Contents><Key>m/a</Key>",
    "elements in elements": XML + "<Contents>" * 20_000,
    "another encoding": '<?xml version="1.0" encoding="klingon"?><l><Contents/></l>',
    "a control character": f"{XML}<l><Contents><Key>m/&#0;</Key></Contents></l>",
    "empty rows": f"{XML}<ListBucketResult><Contents/><Blobs><Blob/></Blobs></ListBucketResult>",
    "entities that grow": (
        f'{XML}<!DOCTYPE l [<!ENTITY a "{"a" * 1000}">'
        + "".join(f'<!ENTITY {b} "{f"&{a};" * 100}">' for a, b in zip("abcde", "bcdef", strict=True))
        + "]><ListBucketResult><Contents><Key>m/&f;</Key></Contents><Blobs>&f;</Blobs></ListBucketResult>"
    ),
    "a file of this machine": (
        f'{XML}<!DOCTYPE l [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
        "<ListBucketResult><Contents><Key>m/&x;</Key></Contents><Blobs>&x;</Blobs></ListBucketResult>"
    ),
}


@dataclass(frozen=True)
class Hostile:
    """What a server answers, and why that, or its one bad file, is refused.

    Attributes:
        name: says what is wrong with it.
        dialect: of the server.
        documents: its answers.
        reason: found in what is said, a regular expression.
        whole: whether all of it is refused, not only a file; None if either will do.

    """

    name: str
    dialect: Dialect
    documents: Documents
    reason: str
    whole: bool | None = True

    def __str__(self) -> str:
        return f"{self.dialect}: {self.name}"


BY_NAME = {dialect.name: dialect for dialect in DIALECTS}


def _rows(dialect: Dialect) -> Iterator[Hostile]:
    """Yield what every API can list."""
    good = dialect.row("config.json", 2)

    def told(name: str, *rows: Any, reason: str, whole: bool | None = False) -> Hostile:
        return Hostile(name, dialect, dialect.documents((good, *rows)), reason, whole)

    for name, (path, reason) in PATHS.items():
        if name not in dialect.unable:
            yield told(
                f"path {name}", dialect.row(path, 1), reason=f"{reason}|malformed path|no path", whole=None
            )
    for name, size in SIZES.items():
        if dialect.text or not isinstance(size, list | dict):
            yield told(f"size {name}", dialect.row("x", size), reason=dialect.size_fault, whole=None)
    yield told("path twice", dialect.row("config.json", 3), reason="twice|two assets of one name", whole=None)
    if dialect.name != "mlflow":  # whose rows have no slashes
        yield told(
            "file and directory", dialect.row("x", 1), dialect.row("x/y", 1), reason="needs a directory"
        )
    if dialect.text:
        for row in (None, 7, "config.json", [], {}):
            reason = "files\\[1\\]|layers\\[1\\]|without|no path|not a Hub's|makes no sense"
            yield told(f"row {row!r}", row, reason=reason, whole=True)
    listing, *_ = dialect.documents([good])
    bodies = BODIES if dialect.text else {name: text.encode() for name, text in DOCUMENTS.items()}
    for name, body in bodies.items():
        yield Hostile(
            f"instead of a listing, {name}",
            dialect,
            {**dialect.documents([]), listing: body},
            "check|correct|manifest",
        )


def _oci() -> Iterator[Hostile]:
    oci = BY_NAME["oci"]
    good = oci_layer("config.json", 2)

    def whole(name: str, manifest: Any, reason: str, whole: bool = True) -> Hostile:
        return Hostile(name, oci, {"/manifests/": manifest}, reason, whole)

    for digest in (
        None, 7, "", "sha256", "sha256:", f"sha256:{'b' * 63}", f"sha256:{'g' * 64}", f"sha256:{'B' * 64}\n",
        f"sha257:{SHA256}", f"../{SHA256}", f"sha256:../{SHA256}",
    ):  # fmt: skip
        yield whole(f"digest {digest!r}", oci_manifest(good, {**good, "digest": digest}), "no usable digest")
    for digest in ("md5:" + "b" * 32, "crc32:" + "b" * 8, f"git-sha1:{SHA}"):
        yield whole(f"digest {digest}", oci_manifest({**good, "digest": digest}), "proves nothing")
    for version in (None, 1, 3, "2", [2]):
        yield whole(f"schema {version!r}", {**oci_manifest(good), "schemaVersion": version}, "schema 2")
    for name in ("layers", "manifests", "blobs"):
        for value in (7, "x", {}, {"0": good}):
            yield whole(f"{name} {value!r}", {**oci_manifest(good), name: value}, f"{name} of the manifest")
        rows = json.dumps({"schemaVersion": 2, name: [None] * 100_001}).encode()
        yield whole(f"100,001 {name}", rows, "no list of at most 100000")
        yield whole(f"{name} of nothing", {"schemaVersion": 2, name: [None]}, "is no descriptor")
    yield whole("neither", {"schemaVersion": 2}, "neither layers nor manifests")
    for config in (7, [], {"digest": "x", "size": 1}, {**good, "size": -1}):
        yield whole(f"config {config!r}", oci_manifest(good, config=config), "config (is no|has no)")
    for path in (".oci/manifest.json", ".oci/layers/x/0-bbb.tar", "./.oci/config.json"):
        yield whole(f"in our place, {path}", oci_manifest(good, oci_layer(path, 1)), "not for files", False)
    tar = oci_layer(
        "../evil",
        1,
        mediaType="text/plain; +tar",
        name="../evil",
        annotations={"org.opencontainers.image.title": "../evil"},
    )
    yield whole("a type with parameters", oci_manifest(good, tar), "'..'", False)
    plain = oci_layer("", 1, mediaType="application/vnd.ollama.image.model", annotations={}, name="../../x")
    yield whole("a name of Ollama's", oci_manifest(good, plain), "'..'", False)
    loop = {**good, "platform": {"os": "unknown", "architecture": "unknown"}}
    yield whole("an index of itself", {"schemaVersion": 2, "manifests": [loop]}, "with another manifest")
    body, documents = b"{}", {}
    for _ in range(8):
        digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
        documents[f"/manifests/{digest}"] = body
        body = json.dumps({"schemaVersion": 2, "manifests": [{**loop, "digest": digest}]}).encode()
    yield Hostile("an index of indexes", oci, {**documents, "/manifests/": body}, "an index in an index")
    elsewhere = [
        {
            **good,
            "digest": f"sha256:{number:064x}",
            "platform": {"os": f"o{number}", "architecture": "a" * 32},
        }
        for number in range(1000)
    ]
    yield whole("a thousand platforms", {"schemaVersion": 2, "manifests": elsewhere}, "not there for")
    note = {**good, "annotations": {"vnd.docker.reference.type": "attestation-manifest"}}
    yield whole("attestations only", {"schemaVersion": 2, "manifests": [note]}, "but for nothing")


def _others() -> Iterator[Hostile]:
    """Yield what is special to one API."""

    def changed(api: str, reason: str, /, **members: Any) -> Iterator[Hostile]:
        """Yield a listing whose second row has other members."""
        dialect = BY_NAME[api]
        good, bad = dialect.row("config.json", 2), dialect.row("x", 1)
        for member, values in members.items():
            for value in values:
                rows = dialect.documents([good, {**bad, member: value}])
                yield Hostile(f"{member} {str(value)[:80]!r}", dialect, rows, reason)

    yield from changed(
        "manifest",
        "must be|another server|malformed path or url",
        sha256=("", "b" * 63, "g" * 64, 7, None, f"{SHA256}\n"),
        etag=("", "x", 'W/"x"', '"a b"', '"\n"', 7, None),
        url=(
            7,
            None,
            "https://elsewhere.example/x",
            "//elsewhere.example/x",
            "file:///etc/passwd",
            "http://[",
            "\ud800",
        ),
    )
    yield from changed(
        "github",
        "malformed id, name, size or date",
        id=(-1, True, "1", None, 10**18, 1.5),
        name=(7, None, ["x"]),
        updated_at=("", "now", "2025\n", 7, 20250701120000, None, "T" * 100),
    )
    github = BY_NAME["github"]
    for number in (None, -1, True, "7", 1.5, [], 1e300):
        release = {"/assets": [], "/releases/": {"id": number}}
        yield Hostile(f"release {number!r}", github, release, "without id")
    parts = [
        {**github.row(f"{family}.part{number}", 1), "id": 2 * family + bool(number)}
        for family in range(50)
        for number in (1, 999_999)
    ]
    yield Hostile(
        "a million parts, fifty times",
        github,
        github.documents([github.row("config.json", 2), *parts]),
        "999997 of its 999999 parts",
        False,
    )
    yield from changed("kaggle", "malformed name or size", name=(7, None, ["x"], {}))
    kaggle = BY_NAME["kaggle"]
    for token in (7, ["x"], {"a": 1}, "a\nb", "\ud800"):
        yield Hostile(
            f"page {token!r}",
            kaggle,
            {"/files": {"files": [], "nextPageToken": token}},
            "malformed nextPageToken",
        )
    for version in (None, 0, -1, True, "1", 1.5, 10**12, [], "../1"):
        newest = replace(
            kaggle, store=lambda url: open_store("kaggle://o/m/f/v", {"endpoint": url.rstrip("/")})
        )
        yield Hostile(
            f"version {version!r}", newest, {"/get": {"versionNumber": version}}, "without versionNumber"
        )
    yield from changed("hf", "not a Hub's", oid=("", "x", f"{SHA}\n", 7, None, "../x"), path=(7, None, ["x"]))
    yield from changed(
        "hf", "not a Hub's", lfs=(7, "x", [1], {"oid": SHA256}, {"size": 1}, {"oid": SHA, "size": 1})
    )
    hub = BY_NAME["hf"]
    for sha in (None, "", "main", "../main", f"{SHA}\n", 7, SHA.upper(), ["a"]):
        commit = {**hub.documents([]), "/api/models/": {"id": "o/n", "sha": sha, "lastModified": DATE}}
        yield Hostile(f"commit {sha!r}", hub, commit, "names no commit|not a Hub's")
    yield from changed(
        "gs", "makes no sense", generation=(None, "", "x", [], {}, float("inf")), crc32c=("?", "AA", 7)
    )
    yield from changed("gs", "makes no sense|not valid text|is not", timeCreated=("yesterday", 7, []))
    s3, az = BY_NAME["s3"], BY_NAME["az"]
    for name, old, new in (
        ("no ETag", f"<ETag>&quot;{SHA}&quot;</ETag>", ""),
        ("no date", f"<LastModified>{DATE}</LastModified>", ""),
        ("another date", DATE, "tomorrow"),
        ("a date before all dates", DATE, "0000-00-00T00:00:00Z"),
        ("no size", "<Size>1</Size>", ""),
        ("no key", "<Key>m/x</Key>", ""),
    ):
        row = s3.row("x", 1).replace(old, new)
        yield Hostile(
            name, s3, s3.documents([s3.row("config.json", 2), row]), "not S3's|makes no sense|has no ETag"
        )
    endless = {name: body.replace(b"false<", b"true<") for name, body in s3.documents([]).items()}
    yield Hostile("a listing without end", s3, endless, "does not end")
    for name, old, new in (
        ("no ETag", "<Etag>0x1</Etag>", ""),
        ("an ETag with a space", "0x1", "0 1"),
        ("no date", "<Last-Modified>Wed, 21 Oct 2015 07:28:00 GMT</Last-Modified>", ""),
        ("another date", "Wed, 21 Oct", "Some day"),
        ("no size", "<Content-Length>1</Content-Length>", ""),
        ("no name", "<Name>m/x</Name>", ""),
        ("a digest that is short", "<BlobType>", "<Content-MD5>AAAA</Content-MD5><BlobType>"),
    ):
        row = az.row("x", 1).replace(old, new)
        yield Hostile(
            name, az, az.documents([az.row("config.json", 2), row]), "makes no sense|unexpected answer"
        )


def _mlflow() -> Iterator[Hostile]:
    mlflow = BY_NAME["mlflow"]
    for root in (
        None,
        7,
        "",
        [],
        "http://[",
        "a\nb",
        "\ud800",
        "mlflow-artifacts:/\udc80",
        "s3://\0",
        "\x1b]0;x\x07",
    ):
        yield Hostile(
            f"artifacts {root!a}",
            mlflow,
            {**MLFLOW_WHERE, "get-download-uri": {"artifact_uri": root}},
            "has no artifact_uri",
        )
    for root in (
        "file:///etc",
        "/etc",
        "http://169.254.169.254/",
        "mlflow-artifacts://elsewhere/1",
        "ftp://x/",
        "s3://",
    ):
        yield Hostile(
            f"artifacts {root}",
            mlflow,
            {**MLFLOW_WHERE, "get-download-uri": {"artifact_uri": root}},
            "cannot be read",
        )
    for version in (None, 7, "", [], {}, "\ud800", "7\n"):
        yield Hostile(
            f"version {version!a}",
            mlflow,
            {**MLFLOW_WHERE, "registered-models/alias": {"model_version": {"version": version}}},
            "has no model_version.version",
        )
    latest = replace(
        mlflow, store=lambda url: open_store("mlflow://models/m/latest", {"tracking_uri": url.rstrip("/")})
    )
    for versions in (7, "x", {}, {"0": {}}, [7], [[]], [{"version": 7}]):
        yield Hostile(
            f"versions {versions!r}",
            latest,
            {"model-versions/search": {"model_versions": versions}},
            "has no (model_versions|version)",
        )
    run = replace(
        mlflow, store=lambda url: open_store("mlflow://runs/r/model", {"tracking_uri": url.rstrip("/")})
    )
    for answer in ({}, {"run": 7}, {"run": []}, {"run": {"info": 7}}, {"run": {"info": {"artifact_uri": 7}}}):
        yield Hostile(f"run {answer!r}", run, {"runs/get": answer}, "has no run.info.artifact_uri")
    for outputs in (7, "x", {}, [7], ["x"], [{}], [{"model_id": 7}], [{"model_id": "\ud800"}]):
        answer = {"runs/get": {"run": {"outputs": {"model_outputs": outputs}}}}
        yield Hostile(
            f"outputs {outputs!a}", run, answer, "has no (run.outputs.model_outputs|model_id|run.info)"
        )
    for member, value in (
        ("creation_timestamp_ms", "soon"), ("creation_timestamp_ms", []), ("creation_timestamp_ms", -1),
        ("creation_timestamp_ms", 1e300), ("model_id", 7), ("artifact_uri", None),
    ):  # fmt: skip
        info = {"name": "model", "model_id": "m-1", "artifact_uri": "mlflow-artifacts:/1", member: value}
        answer = {
            "runs/get": {"run": {"outputs": {"model_outputs": [{"model_id": "m-1"}]}}},
            "logged-models/": {"model": {"info": info}},
        }
        yield Hostile(f"logged model, {member} {value!r}", run, answer, f"has no {member}")


def _pages() -> Iterator[Hostile]:
    site = BY_NAME["manifest"]

    def page(name: str, links: str, reason: str, whole: bool = False) -> Hostile:
        text = f"<html><a href='config.json'>x</a>{links}".encode()
        return Hostile(
            f"page, {name}",
            site,
            {"config.json": b"{}", "?": b"", "-manifest": b"<html>", "/": text},
            reason,
            whole,
        )

    for name, link in {
        "NUL": "a%00b", "newline": "a%0Ab", "escape": "%1B[2J", "delete": "%7F",
        "long": "m" * 256, "long in bytes": "%C3%A4" * 128,
    }.items():  # fmt: skip
        yield page(name, f"<a href='{link}'>x</a>", "control character|longer than 255")
    yield page(
        "up, written otherwise", "<a href='%2e%2e'>x</a><a href='a%00'>x</a>", "'..'|control character"
    )
    yield page("directories without end", "<a href='d/'>x</a>", "deeper than 32 directories")
    few = replace(site, store=lambda url: open_store(url, {"max_entries": 100}))
    many = page(
        "101 files",
        "".join(f"<a href={number}>" for number in range(100)),
        "more than 100 entries",
        whole=True,
    )
    yield replace(many, dialect=few)


CORPUS = [
    *(hostile for dialect in DIALECTS for hostile in _rows(dialect)),
    *_oci(),
    *_others(),
    *_mlflow(),
    *_pages(),
]
