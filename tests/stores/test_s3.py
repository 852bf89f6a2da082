"""What s3:// promises beyond the contract, and that the S3 it is tested against is one."""

from __future__ import annotations

import base64
import hashlib
import itertools
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
import trio

from modelfs.errors import AccessDenied, BadAnswer, ConfigError, NotFound, Stale, StoreError, Unavailable
from modelfs.stores import open_store
from modelfs.stores.s3 import S3Store
from modelfs.testing import read_span
from modelfs.testing.s3 import KEY_ID, SECRET, S3Server
from modelfs.types import Algorithm, Digest, Entry, Location, Snapshot, Span
from tests.stores.scripted import Answer, scripted


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as s3:
        yield s3


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep this machine's own credentials and metadata service out."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))


@pytest.fixture
def s3(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, and an environment that leads to it."""
    for name, value in server.env().items():
        monkeypatch.setenv(name, value)
    return server


names = (f"models-{number}" for number in itertools.count())


def bucket(s3: S3Server, objects: Mapping[str, bytes], *, versioned: bool = False, **how: Any) -> str:
    """Make a bucket that no other test uses."""
    name = next(names)
    client = s3.client()
    client.create_bucket(Bucket=name)
    if versioned:
        client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
    for key, data in objects.items():
        client.put_object(Bucket=name, Key=key, Body=data, **how)
    return name


def put(s3: S3Server, name: str, key: str, data: bytes) -> None:
    s3.client().put_object(Bucket=name, Key=key, Body=data)


def snapshot(store: S3Store) -> Snapshot:
    return trio.run(store.snapshot)


def locate(store: S3Store, entry: Entry) -> Location:
    return trio.run(store.locate, entry)


def read(store: S3Store, entry: Entry) -> bytes:
    return trio.run(read_span, locate(store, entry), Span(0, entry.size))


# URLs and options


@pytest.mark.parametrize(
    ("url", "canonical"),
    [
        ("s3://models", "s3://models/"),
        ("s3://models/", "s3://models/"),
        ("S3://my.models/a/b", "s3://my.models/a/b"),
        ("s3://models/a b/ü?#%41+/", "s3://models/a b/ü?#%41+/"),
    ],
)
def test_a_url_has_one_canonical_form(url: str, canonical: str) -> None:
    assert open_store(url).url == canonical


@pytest.mark.parametrize(
    "url", ["s3://", "s3:///key", "s3://user:pw@bucket/", "s3://b/../x", "s3://b/a//b", "s3://b//"]
)
def test_a_malformed_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        S3Store(url, {})


@pytest.mark.parametrize(
    "options",
    [
        {"access_key_id": "x"},
        {"secret_access_key": "x"},
        {"addressing_style": "round"},
        {"endpoint_url": "localhost:9000"},
        {"endpoint_url": "http://user:pw@localhost:9000"},
        {"expires": 0},
        {"expires": 8 * 24 * 3600},
        {"max_entries": 0},
        {"anonymous": "yes"},
    ],
)
def test_malformed_options_are_refused_without_showing_them(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        S3Store("s3://models/", options)
    assert "pw" not in str(caught.value)


# Snapshots


def test_a_listing_of_many_pages_is_whole(s3: S3Server, tmp_path: Path) -> None:
    keys = [f"many/shard-{number:05}.bin" for number in range(1201)]
    name = bucket(s3, {})
    (tmp_path / "shard").write_bytes(b"x")
    for key in keys:
        s3.put_file(name, key, tmp_path / "shard")
    before = len(s3.requests)
    found = snapshot(S3Store(f"s3://{name}/many/", {}))
    assert [f"many/{path}" for path in found.entries] == keys
    assert sum("list-type" in request.query for request in s3.requests[before:]) == 2


def test_a_bucket_too_large_to_list_is_looked_up_name_by_name(s3: S3Server) -> None:
    name = bucket(s3, {"a/1": b"1", "a/2": b"2", "b": b"3"})
    store = S3Store(f"s3://{name}", {"max_entries": 2})
    found = snapshot(store)
    assert (found.complete, dict(found.entries)) == (False, {})
    assert trio.run(store.entry, "a").kind == "directory"
    assert read(store, trio.run(store.entry, "a/2")) == b"2"
    assert snapshot(S3Store(f"s3://{name}", {"max_entries": 3})).complete


def test_a_prefix_is_a_directory_and_not_the_beginning_of_a_name(s3: S3Server) -> None:
    name = bucket(s3, {"pre/x": b"1", "prefix-other/y": b"2", "pre": b"3", "prefix": b"4"})
    for url in (f"s3://{name}/pre", f"s3://{name}/pre/"):
        assert list(snapshot(S3Store(url, {})).entries) == ["x"]


def test_the_name_of_an_object_is_a_model_of_one_file(s3: S3Server) -> None:
    name = bucket(s3, {"a/model.gguf": b"weights", "a/model.gguf.sha256": b""})
    store = S3Store(f"s3://{name}/a/model.gguf", {})
    entry = snapshot(store).entries["model.gguf"]
    assert trio.run(store.entry, "model.gguf") == entry
    assert read(store, entry) == b"weights"
    with pytest.raises(NotFound):
        snapshot(S3Store(f"s3://{name}/a/model.gguf/", {}))


def test_markers_of_directories_are_directories(s3: S3Server) -> None:
    name = bucket(s3, {"m/": b"", "m/empty/": b"", "m/full/": b"", "m/full/x": b"1"})
    found = snapshot(S3Store(f"s3://{name}/m/", {}))
    assert {path: entry.kind for path, entry in found.entries.items()} == {
        "empty": "directory",
        "full": "directory",
        "full/x": "file",
    }
    assert not snapshot(S3Store(f"s3://{name}/m/empty/", {})).entries


def test_keys_that_are_no_paths_are_rejected(s3: S3Server) -> None:
    keys = ["good", "a//b", "b//", "../up", "dir/./x", "/etc/passwd", "new&#10;line", "good"]
    row = "<Contents><Key>%s</Key><Size>1</Size><ETag>&quot;v&quot;</ETag>%s</Contents>"
    rows = "".join(row % (key, "<LastModified>2024-01-01T00:00:00.000Z</LastModified>") for key in keys)
    with scripted() as (url, answers):
        answers.append((200, {}, f"<ListBucketResult>{rows}</ListBucketResult>".encode()))
        found = snapshot(S3Store("s3://models", {"endpoint_url": url, "region": "us-east-1"}))
    assert list(found.entries) == ["good"]
    assert len(found.rejected) == 7


def test_what_other_servers_write_into_a_listing_is_understood(s3: S3Server) -> None:
    row = (
        "<n:Contents><n:Owner><n:ID>Size</n:ID></n:Owner><n:Key>dir%2Fa+b%25</n:Key><n:Size>1</n:Size>"
        "<n:ETag>v</n:ETag><n:LastModified>Mon, 01 Jan 2024 00:00:00 GMT</n:LastModified></n:Contents>"
    )
    body = f'<n:R xmlns:n="urn:s3"><n:EncodingType>url</n:EncodingType>{row}<n:KeyCount>1</n:KeyCount></n:R>'
    with scripted() as (url, answers):
        answers.append((200, {}, body.encode()))
        found = snapshot(S3Store("s3://models", {"endpoint_url": url, "region": "us-east-1"}))
    assert dict(found.entries) == {"dir/a b%": Entry("dir/a b%", 1, "v", mtime=1704067200.0)}


def test_what_is_missing_is_named(s3: S3Server) -> None:
    with pytest.raises(NotFound, match="no such bucket"):
        snapshot(S3Store("s3://no-such-bucket/x/", {}))
    name = bucket(s3, {"x": b""})
    with pytest.raises(NotFound, match=f"s3://{name}/nothing: there is nothing under this name"):
        snapshot(S3Store(f"s3://{name}/nothing", {}))
    with pytest.raises(NotFound, match="no 'y'"):
        trio.run(S3Store(f"s3://{name}", {}).entry, "y")


def test_the_revision_follows_the_content(s3: S3Server) -> None:
    name = bucket(s3, {"x": b"1"})
    store = S3Store(f"s3://{name}", {})
    first = snapshot(store)
    assert snapshot(store) == first
    put(s3, name, "x", b"2")
    second = snapshot(store)
    assert second.revision != first.revision
    assert second.entries["x"].version == hashlib.md5(b"2").hexdigest()


# Versions


def test_a_bucket_with_versions_still_has_the_overwritten_and_the_deleted(s3: S3Server) -> None:
    name = bucket(s3, {"x": b"old", "y": b"deleted", "x-beside": b"old"}, versioned=True)
    store = S3Store(f"s3://{name}", {})
    old = snapshot(store)
    put(s3, name, "x", b"new")
    s3.client().delete_object(Bucket=name, Key="y")
    assert read(store, old.entries["x"]) == b"old"
    assert read(store, old.entries["y"]) == b"deleted"
    assert read(store, snapshot(store).entries["x"]) == b"new"


def test_a_location_is_pinned_to_the_version(s3: S3Server) -> None:
    name = bucket(s3, {"x": b"old"}, versioned=True)
    store = S3Store(f"s3://{name}", {})
    location = locate(store, snapshot(store).entries["x"])
    put(s3, name, "x", b"new")
    assert httpx.get(location.url, headers={"If-Match": location.etag or ""}).content == b"old"


def test_without_versions_an_overwritten_object_is_stale(s3: S3Server) -> None:
    name = bucket(s3, {"x": b"old", "y": b"old"})
    store = S3Store(f"s3://{name}", {})
    old = snapshot(store)
    location = locate(store, old.entries["x"])
    put(s3, name, "x", b"new")
    s3.client().delete_object(Bucket=name, Key="y")
    for path in ("x", "y"):
        with pytest.raises(Stale, match="refresh the model"):
            locate(store, old.entries[path])
    assert httpx.get(location.url, headers={"If-Match": location.etag or ""}).status_code == 412


@pytest.mark.parametrize("refusal", [(501, {}, b""), (403, {}, b""), (405, {}, b"")])
def test_a_server_that_tells_no_versions_makes_overwritten_objects_stale(
    s3: S3Server, refusal: Answer
) -> None:
    with scripted() as (url, answers):
        answers += [HEAD_OK, refusal]
        store = S3Store("s3://models", {"endpoint_url": url, "region": "us-east-1"})
        with pytest.raises(Stale):
            locate(store, Entry("x", 1, "overwritten"))


# Locations


def test_a_location_is_a_presigned_url_with_the_etag(s3: S3Server) -> None:
    name = bucket(s3, {"dir/a b+c.bin": b"0123456789"})
    store = S3Store(f"s3://{name}/dir/", {"expires": 120})
    start = time.time()
    location = locate(store, snapshot(store).entries["a b+c.bin"])
    query = parse_qs(urlsplit(location.url).query)
    assert query["X-Amz-Expires"] == ["120"]
    assert query["X-Amz-Algorithm"] == ["AWS4-HMAC-SHA256"]
    assert location.expires is not None
    assert start + 119 < location.expires <= time.time() + 120
    assert location.etag == f'"{hashlib.md5(b"0123456789").hexdigest()}"'
    assert KEY_ID in location.url
    assert KEY_ID not in repr(location)
    assert SECRET not in location.url
    answer = httpx.get(location.url, headers={"Range": "bytes=2-4", "If-Match": location.etag})
    assert (answer.status_code, answer.content) == (206, b"234")


@pytest.mark.parametrize("algorithm", ["sha256", "sha1", "crc32c", "crc32"])
def test_a_published_checksum_is_the_digest(s3: S3Server, algorithm: Algorithm) -> None:
    data = b"the whole object"
    hasher = Digest.parse(f"{algorithm}:{'0' * {'sha256': 64, 'sha1': 40}.get(algorithm, 8)}").hasher(
        len(data)
    )
    hasher.update(data)
    checksum = base64.b64encode(bytes.fromhex(hasher.hexdigest())).decode()
    name = bucket(
        s3, {"x": data}, **{"ChecksumAlgorithm": algorithm.upper(), f"Checksum{algorithm.upper()}": checksum}
    )
    store = S3Store(f"s3://{name}", {})
    assert locate(store, snapshot(store).entries["x"]).digest == Digest(algorithm, hasher.hexdigest())


@pytest.mark.parametrize(
    ("headers", "algorithm"),
    [
        ({"x-amz-checksum-crc32": "AAAAAA==", "x-amz-checksum-type": "FULL_OBJECT"}, "crc32"),
        (
            {"x-amz-checksum-crc32": "AAAAAA==", "x-amz-checksum-type": "FULL_OBJECT", "ETag": '"v-2"'},
            "crc32",
        ),
        ({"x-amz-checksum-crc32": "AAAAAA==", "x-amz-checksum-crc32c": "AAAAAA=="}, "crc32c"),
        ({"x-amz-checksum-crc32": "AAAAAA==", "x-amz-checksum-type": "COMPOSITE"}, None),
        ({"x-amz-checksum-crc32": "AAAAAA==", "ETag": '"v-2"'}, None),
        ({"x-amz-checksum-crc32": "AAAAAA==-2"}, None),
        ({"x-amz-checksum-sha256": "AAAAAA=="}, None),
        ({"x-amz-checksum-crc64nvme": "AAAAAAAAAAA="}, None),
    ],
)
def test_only_a_checksum_of_the_whole_object_is_its_digest(
    s3: S3Server, headers: dict[str, str], algorithm: str | None
) -> None:
    with scripted() as (url, answers):
        answers.append((200, {**HEAD_OK[1], **headers}, b""))
        store = S3Store("s3://models", {"endpoint_url": url, "region": "us-east-1"})
        version = headers.get("ETag", '"v"').strip('"')
        digest = locate(store, Entry("x", 1, version)).digest
    assert (digest and digest.algorithm) == algorithm


def test_the_checksum_of_parts_is_not_taken_for_the_whole(s3: S3Server) -> None:
    name, client = bucket(s3, {}), s3.client()
    upload = client.create_multipart_upload(Bucket=name, Key="x", ChecksumAlgorithm="SHA256")["UploadId"]
    parts = []
    for number, data in enumerate((b"a" * (5 << 20), b"b"), 1):
        part = client.upload_part(
            Bucket=name, Key="x", UploadId=upload, PartNumber=number, Body=data, ChecksumAlgorithm="SHA256"
        )
        parts.append({"PartNumber": number, "ETag": part["ETag"], "ChecksumSHA256": part["ChecksumSHA256"]})
    client.complete_multipart_upload(Bucket=name, Key="x", UploadId=upload, MultipartUpload={"Parts": parts})
    store = S3Store(f"s3://{name}", {})
    entry = snapshot(store).entries["x"]
    assert entry.version.endswith("-2")
    location = locate(store, entry)
    assert location.digest is None
    assert trio.run(read_span, location, Span((5 << 20) - 1, entry.size)) == b"ab"


def test_the_bucket_is_asked_for_its_region(s3: S3Server) -> None:
    client, name = s3.client(), next(names)
    client.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    put(s3, name, "x", b"1")
    for options, region in [({}, "eu-west-1"), ({"region": "ap-south-1"}, "ap-south-1")]:
        store = S3Store(f"s3://{name}", options)
        entry = Entry("x", 1, hashlib.md5(b"1").hexdigest())
        location = locate(store, entry)
        assert f"/{region}/s3/" in parse_qs(urlsplit(location.url).query)["X-Amz-Credential"][0]
        assert read(store, entry) == b"1"


def test_urls_signed_with_temporary_credentials_live_ten_minutes(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = bucket(s3, {"x": b"1"})
    monkeypatch.setenv("AWS_SESSION_TOKEN", "temporary")
    store = S3Store(f"s3://{name}", {"expires": 7200})
    location = locate(store, snapshot(store).entries["x"])
    assert parse_qs(urlsplit(location.url).query)["X-Amz-Expires"] == ["600"]
    assert location.expires is not None
    assert location.expires <= time.time() + 600


def test_requester_pays_is_signed_and_sent(s3: S3Server) -> None:
    name = bucket(s3, {"x": b"1"})
    store = S3Store(f"s3://{name}", {"requester_pays": True})
    entry = snapshot(store).entries["x"]
    location = locate(store, entry)
    assert dict(location.headers) == {"x-amz-request-payer": "requester"}
    assert httpx.get(location.url).status_code == 403
    assert read(store, entry) == b"1"


VIRTUAL, PATH = "http://models.s3.eu-west-1.amazonaws.com/x", "http://s3.eu-west-1.amazonaws.com/models/x"
HEAD_OK = (200, {"ETag": '"v"', "Content-Length": "1", "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}, b"")


@pytest.mark.parametrize(
    ("endpoint", "style", "expected"),
    [
        ("http://s3.eu-west-1.amazonaws.com", "auto", VIRTUAL),
        ("http://s3.eu-west-1.amazonaws.com", "virtual", VIRTUAL),
        ("http://s3.eu-west-1.amazonaws.com", "path", PATH),
        ("http://minio.example:9000", "auto", "http://minio.example:9000/models/x"),
        ("http://minio.example:9000", "virtual", "http://models.minio.example:9000/x"),
        ("http://127.0.0.1:9000", "auto", "http://127.0.0.1:9000/models/x"),
    ],
)
def test_the_addressing_style_fits_the_endpoint(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, endpoint: str, style: str, expected: str
) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with scripted() as (proxy, answers):  # a proxy is asked whatever the host
        answers.append(HEAD_OK)
        monkeypatch.setenv("http_proxy", proxy)
        options = {"region": "eu-west-1", "addressing_style": style, "endpoint_url": endpoint}
        location = locate(S3Store("s3://models", options), Entry("x", 1, "v"))
    assert location.url.partition("?")[0] == expected


# Credentials


def test_a_profile_of_the_configuration_is_used(server: S3Server, tmp_path: Path) -> None:
    name = bucket(server, {"x": b"1"})
    (tmp_path / "config").write_text(f"[profile minio]\nendpoint_url = {server.url}\nregion = us-east-1\n")
    (tmp_path / "credentials").write_text(
        f"[minio]\naws_access_key_id = {KEY_ID}\naws_secret_access_key = {SECRET}\n"
    )
    store = S3Store(f"s3://{name}", {"profile": "minio"})
    assert read(store, snapshot(store).entries["x"]) == b"1"
    with pytest.raises(AccessDenied, match="profile does not exist"):
        snapshot(S3Store(f"s3://{name}", {"profile": "absent"}))


def test_credentials_that_are_rotated_are_read_anew(server: S3Server, tmp_path: Path) -> None:
    name = bucket(server, {"x": b"1"})
    (tmp_path / "credentials").write_text(
        f"[default]\naws_access_key_id = {KEY_ID}\naws_secret_access_key = {SECRET}gone\n"
    )
    store = S3Store(f"s3://{name}", {"endpoint_url": server.url})
    with pytest.raises(AccessDenied, match="secret key is wrong"):
        snapshot(store)
    (tmp_path / "credentials").write_text(
        f"[default]\naws_access_key_id = {KEY_ID}\naws_secret_access_key = {SECRET}\n"
    )
    assert read(store, snapshot(store).entries["x"]) == b"1"


def test_wrong_credentials_are_denied_and_not_shown(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    name = bucket(s3, {"x": b"1"})
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrongSecret")
    with pytest.raises(AccessDenied, match="secret key is wrong") as caught:
        snapshot(S3Store(f"s3://{name}", {}))
    assert "wrongSecret" not in str(caught.value) + repr(caught.value) + repr(caught.value.__cause__)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAWRONG")
    with pytest.raises(AccessDenied, match="access key is unknown") as caught:
        snapshot(S3Store(f"s3://{name}", {}))
    assert "AKIAWRONG" not in str(caught.value)


def test_no_credentials_at_all_says_what_to_set(server: S3Server) -> None:
    with pytest.raises(AccessDenied, match="no AWS credentials: set profile"):
        snapshot(S3Store("s3://models", {"endpoint_url": server.url}))


def test_a_public_object_is_read_anonymously(server: S3Server) -> None:
    name = bucket(server, {"x": b"public"}, ACL="public-read")
    put(server, name, "y", b"private")
    store = S3Store(f"s3://{name}", {"endpoint_url": server.url, "anonymous": True})
    found = snapshot(store)
    location = locate(store, found.entries["x"])
    assert (location.url, location.expires) == (f"{server.url}/{name}/x", None)
    assert read(store, found.entries["x"]) == b"public"
    with pytest.raises(AccessDenied):
        locate(store, found.entries["y"])


# Failures


def test_an_outage_is_unavailable_and_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    with S3Server() as s3:
        for name, value in s3.env().items():
            monkeypatch.setenv(name, value)
        store = S3Store(f"s3://{bucket(s3, {'x': b'1'})}", {})
        entry = snapshot(store).entries["x"]
        s3.stop()
        for verb in (store.snapshot, lambda: store.locate(entry)):
            with pytest.raises(Unavailable, match="cannot be reached"):
                trio.run(verb)
        s3.start()
        assert read(store, entry) == b"1"


def xml(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>Secret detail\nof the server</Message></Error>".encode()


ENTITY = (
    b"<!DOCTYPE A [<!ENTITY x 'y'>]><A><Contents><Key>&x;</Key><Size>1</Size><ETag>v</ETag>"
    b"<LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents></A>"
)


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        ((404, {}, xml("NoSuchBucket")), NotFound, "no such bucket"),
        ((400, {}, xml("InvalidBucketName")), NotFound, "name of a bucket"),
        ((403, {}, xml("AccessDenied")), AccessDenied, "s3:ListBucket"),
        ((403, {}, xml("InvalidAccessKeyId")), AccessDenied, "unknown"),
        ((403, {}, xml("SignatureDoesNotMatch")), AccessDenied, "secret key"),
        ((403, {}, xml("RequestTimeTooSkewed")), AccessDenied, "clock"),
        ((400, {}, xml("ExpiredToken")), AccessDenied, "session has expired"),
        ((403, {}, b""), AccessDenied, "access denied"),
        ((403, {}, xml("SomethingNew")), AccessDenied, "access denied"),
        ((301, {"x-amz-bucket-region": "eu-west-1"}, xml("PermanentRedirect")), NotFound, "another region"),
        ((301, {}, b"no region, for ever"), BadAnswer, "not S3's|makes no sense"),
        ((400, {}, xml("AuthorizationHeaderMalformed")), NotFound, "another region"),
        ((503, {}, xml("SlowDown")), Unavailable, "busy"),
        ((500, {}, xml("InternalError")), Unavailable, "busy"),
        ((502, {}, b"<html>bad gateway</html>"), Unavailable, "busy"),
        ((501, {}, xml("NotImplemented")), BadAnswer, "not implement"),
        ((418, {}, xml("Teapot; rm -rf")), BadAnswer, "418 Teapotrmrf"),
        ((200, {}, b"<html>a captive portal"), Unavailable, "or not S3"),
        ((200, {}, b"<A><Contents><Size>1</Size></Contents></A>"), BadAnswer, "not S3's|makes no sense"),
        ((200, {}, b"<A><IsTruncated>true</IsTruncated></A>"), BadAnswer, "does not end"),
        ((200, {}, b"<A><Contents><Key>x</Key><Size>1</Size></Contents></A>"), BadAnswer, "no ETag"),
        ((200, {}, b"<A><Contents><Size>many</Size></Contents></A>"), BadAnswer, "not S3's|makes no sense"),
        ((200, {}, ENTITY), BadAnswer, "not S3's|makes no sense"),
    ],
)  # fmt: skip
def test_every_answer_has_its_meaning(
    s3: S3Server, answer: Answer, kind: type[StoreError], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # boto3 waits between its attempts
    with scripted() as (url, answers):
        answers.append(answer)
        with pytest.raises(kind, match=text) as caught:
            snapshot(S3Store("s3://models", {"endpoint_url": url, "region": "us-east-1"}))
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert "detail" not in str(caught.value)


def test_a_store_that_is_busy_says_how_long_to_wait(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with scripted() as (url, answers):
        answers.append((503, {"Retry-After": "9"}, xml("SlowDown")))
        with pytest.raises(Unavailable) as caught:
            snapshot(S3Store("s3://models", {"endpoint_url": url, "region": "us-east-1"}))
    assert caught.value.retry_after == 9


def test_the_right_to_read_one_object_is_enough_for_it(s3: S3Server) -> None:
    with scripted() as (url, answers):
        answers += [(403, {}, xml("AccessDenied")), HEAD_OK]
        store = S3Store("s3://models/x.bin", {"endpoint_url": url, "region": "us-east-1"})
        found = snapshot(store)
        assert {path: entry.version for path, entry in found.entries.items()} == {"x.bin": "v"}
        answers[:] = [(403, {}, xml("AccessDenied")), (403, {}, b"")]
        with pytest.raises(AccessDenied):
            snapshot(store)


def test_without_the_right_to_read_versions_the_etag_is_the_pin(s3: S3Server) -> None:
    with scripted() as (url, answers):
        versioned = (200, {**HEAD_OK[1], "x-amz-version-id": "v1"}, b"")
        answers += [versioned, (403, {}, b""), versioned]
        store = S3Store("s3://models", {"endpoint_url": url, "region": "us-east-1"})
        for _ in range(2):
            location = locate(store, Entry("x", 1, "v"))
            assert "versionId" not in location.url
            assert location.etag == '"v"'


def test_an_archived_object_says_so(s3: S3Server) -> None:
    with scripted() as (url, answers):
        store = S3Store("s3://models", {"endpoint_url": url, "region": "us-east-1"})
        archived = {**HEAD_OK[1], "x-amz-storage-class": "GLACIER"}
        answers.append((200, archived, b""))
        with pytest.raises(AccessDenied, match=r"archived \(GLACIER\): restore it first"):
            locate(store, Entry("x", 1, "v"))
        answers[:] = [(200, {**archived, "x-amz-restore": 'ongoing-request="false", expiry-date="x"'}, b"")]
        assert locate(store, Entry("x", 1, "v")).etag == '"v"'


def test_a_certificate_that_is_not_trusted_names_the_option(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ssl

    import trustme

    monkeypatch.setattr("time.sleep", lambda seconds: None)
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with scripted(context) as (url, answers):
        answers.append((200, {}, b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"))
        options = {"endpoint_url": url, "region": "us-east-1"}
        with pytest.raises(Unavailable, match="set ca_bundle"):
            snapshot(S3Store("s3://models", options))
        found = snapshot(S3Store("s3://models", {**options, "ca_bundle": str(tmp_path / "ca.pem")}))
    assert not found.entries


def test_many_calls_at_once_all_succeed(s3: S3Server) -> None:
    name = bucket(s3, {f"x{number}": b"%d" % number for number in range(40)})
    store = S3Store(f"s3://{name}", {})
    found: dict[str, bytes] = {}

    async def one(entry: Entry) -> None:
        found[entry.path] = await read_span(await store.locate(entry), Span(0, entry.size))

    async def main() -> None:
        entries = (await store.snapshot()).entries.values()
        async with trio.open_nursery() as nursery:
            for entry in entries:
                nursery.start_soon(one, entry)

    trio.run(main)
    assert found == {f"x{number}": b"%d" % number for number in range(40)}


# The server itself


def test_the_server_refuses_urls_that_were_tampered_with_or_ran_out(s3: S3Server, tmp_path: Path) -> None:
    store = S3Store(f"s3://{bucket(s3, {'x': b'1'})}", {"expires": 1})
    location = locate(store, snapshot(store).entries["x"])
    longer = location.url.replace("X-Amz-Expires=1&", "X-Amz-Expires=3600&")
    assert longer != location.url
    assert "SignatureDoesNotMatch" in httpx.get(longer).text
    assert httpx.get(location.url.partition("?")[0]).status_code == 403
    while time.time() < (location.expires or 0):
        assert httpx.get(location.url).status_code in (200, 403)
    assert "Request has expired" in httpx.get(location.url).text


def test_the_server_reads_ranges_of_large_objects_and_keeps_them_through_an_outage(tmp_path: Path) -> None:
    large = tmp_path / "large file"
    data = os.urandom(9 << 20)
    large.write_bytes(data)
    with S3Server() as s3:
        name = bucket(s3, {"uploaded": data})
        s3.put_file(name, "put ü+", large)
        s3.stop()
        s3.start()
        client = s3.client()
        for key in ("uploaded", "put ü+"):
            head = client.head_object(Bucket=name, Key=key)
            assert (head["ContentLength"], head["ETag"]) == (len(data), f'"{hashlib.md5(data).hexdigest()}"')
            found = client.get_object(Bucket=name, Key=key, Range="bytes=8388607-8388609")
            assert found["Body"].read() == data[8388607:8388610]
            assert client.get_object(Bucket=name, Key=key)["Body"].read() == data
        assert len(s3.data_requests) == 4
        assert s3.data_requests[0].range == "bytes=8388607-8388609"
        checked = client.head_object(Bucket=name, Key="put ü+", ChecksumMode="ENABLED")
        assert checked["ChecksumSHA256"]


def test_the_server_takes_its_process_along() -> None:
    with S3Server() as s3:
        assert httpx.get(f"{s3.url}/").status_code < 500
    with pytest.raises(httpx.ConnectError):
        httpx.get(s3.url)
