"""az:// in detail: ETags and versions, where credentials come from, and what is refused."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trustme
from azure.core.exceptions import ClientAuthenticationError
from azure.identity import DefaultAzureCredential

from modelfs.errors import AccessDenied, ConfigError, NotFound, Stale, StoreError
from modelfs.stores import identity_of, open_store
from modelfs.testing import read_span
from modelfs.types import Digest, Entry, Snapshot, Span
from tests.stores.azurite import ACCOUNT, CONTAINER, KEY, Azure, azurite
from tests.stores.scripted import scripted as scripted_list
from tests.stores.site import Reply, Request, scripted

MODEL = f"az://{ACCOUNT}/{CONTAINER}/bert"


@pytest.fixture(scope="module")
def running() -> Iterator[Azure]:
    with azurite() as server:
        yield server


@pytest.fixture
def server(running: Azure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Azure:
    monkeypatch.setenv("AZURE_CONFIG_DIR", str(tmp_path))
    for blob in running.container.list_blob_names():
        running.container.delete_blob(blob)
    return running


def snapshot(url: str, **options: object) -> Snapshot:
    return trio.run(open_store(url, options).snapshot)


def test_a_blob_that_is_overwritten_while_it_is_read_is_stale(server: Azure) -> None:
    server.put("bert/model.bin", b"old content")
    store = open_store(MODEL, {"connection_string": server.connection_string})

    async def read() -> None:
        entry = (await store.snapshot()).entries["model.bin"]
        location = await store.locate(entry)
        assert await read_span(location, Span(0, 3)) == b"old"
        server.put("bert/model.bin", b"new content")
        with pytest.raises(Stale):
            await read_span(location, Span(4, 11))
        with pytest.raises(Stale, match="was changed or removed"):
            await store.locate(entry)
        assert (await store.entry("model.bin")).version != entry.version

    trio.run(read)


def test_the_digest_is_the_content_md5(server: Azure) -> None:
    server.put("bert/a", b"hello")
    found = snapshot(MODEL, connection_string=server.connection_string).entries
    assert found["a"].digest == Digest("md5", "5d41402abc4b2a76b9719d911017c592")


def test_directories_of_a_hierarchical_namespace_are_directories(server: Azure) -> None:
    server.container.upload_blob("bert/sub", b"", metadata={"hdi_isfolder": "true"})
    server.container.upload_blob("bert/empty", b"", metadata={"hdi_isfolder": "true"})
    server.put("bert/sub/a", b"x")
    found = snapshot(MODEL, connection_string=server.connection_string).entries
    assert {path: entry.kind for path, entry in found.items()} == {
        "empty": "directory", "sub": "directory", "sub/a": "file",
    }  # fmt: skip


def test_what_is_archived_is_not_shown(server: Azure) -> None:
    server.put("bert/a", b"x")
    server.put("bert/b", b"x")
    server.container.get_blob_client("bert/b").set_standard_blob_tier("Archive")
    found = snapshot(MODEL, connection_string=server.connection_string)
    assert list(found.entries) == ["a"]
    assert found.rejected == (("b", "it is archived: rehydrate it first"),)


def test_a_larger_model_is_looked_up_name_by_name(server: Azure) -> None:
    for number in range(4):
        server.put(f"bert/{number}", b"x")
    store = open_store(MODEL, {"connection_string": server.connection_string, "max_entries": 3})
    assert not trio.run(store.snapshot).complete
    assert trio.run(store.entry, "3").size == 1
    with pytest.raises(NotFound):
        trio.run(store.entry, "4")


def test_a_signature_is_read_again_and_its_end_is_known(
    server: Azure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server.put("bert/a", b"content")
    config = tmp_path / "config"
    config.write_text(f"[storage]\naccount = {ACCOUNT}\nsas_token = ?{server.sas(seconds=-10)}\n")
    store = open_store(MODEL, {"endpoint": server.url})
    with pytest.raises(AccessDenied) as caught:
        trio.run(store.snapshot)
    assert "sig=" not in str(caught.value)
    config.write_text(f"[storage]\naccount = {ACCOUNT}\nsas_token = {server.sas(seconds=600)}\n")
    location = trio.run(store.locate, trio.run(store.snapshot).entries["a"])
    assert location.expires is not None
    assert 500 < location.expires - time.time() <= 600
    assert trio.run(read_span, location, Span(0, 7)) == b"content"


def test_a_secret_for_another_account_is_not_used(server: Azure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", f"AccountName=another;AccountKey={KEY}")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "another")
    monkeypatch.setenv("AZURE_STORAGE_KEY", KEY)
    server.put("bert/a", b"content")
    store = open_store(MODEL, {"endpoint": server.url, "sas_token": server.sas()})
    location = trio.run(store.locate, trio.run(store.snapshot).entries["a"])
    assert "sp=rl" in location.url  # of the container's signature, not of one made with the key


def test_an_identity_reads_with_its_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A managed identity's token is asked of the machine's metadata service, here one that is ours."""
    for name in ("CLIENT_ID", "TENANT_ID", "CLIENT_SECRET", "FEDERATED_TOKEN_FILE"):
        monkeypatch.delenv(f"AZURE_{name}", raising=False)
    monkeypatch.setenv("AZURE_CONFIG_DIR", str(tmp_path))
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    end = int(time.time()) + 7200
    token = {"access_token": "s3cr3t", "expires_in": 7200, "expires_on": end, "token_type": "Bearer"}
    properties = {"ETag": '"0x1"', "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT", "Content-Length": "7"}
    with scripted_list() as (identity, tokens), scripted_list(context) as (url, blobs):
        tokens.append((200, {"Content-Type": "application/json"}, json.dumps(token).encode()))
        blobs.append((200, properties, b"content"))
        monkeypatch.setenv("AZURE_POD_IDENTITY_AUTHORITY_HOST", identity)
        location = trio.run(open_store(MODEL, {"endpoint": url}).locate, Entry("a", 7, "0x1"))
    assert location.url == f"{url}/models/bert/a"
    assert location.headers["authorization"] == "Bearer s3cr3t"
    assert location.headers["x-ms-version"]
    assert location.expires == pytest.approx(end, abs=60)
    assert "s3cr3t" not in repr(location)


def test_a_token_is_not_sent_in_the_clear(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AZURE_CONFIG_DIR", str(tmp_path))
    with pytest.raises(AccessDenied, match="over https only"):
        snapshot(MODEL, endpoint="http://127.0.0.1:9")


def test_an_overwritten_blob_is_read_by_its_version_where_the_account_keeps_them() -> None:
    row = (
        "<Blob><Name>bert/a</Name><VersionId>{version}</VersionId><Properties><BlobType>BlockBlob</BlobType><Etag>{etag}</Etag>"
        "<Content-Length>7</Content-Length><Last-Modified>Wed, 21 Oct 2015 07:28:00 GMT</Last-Modified>"
        "</Properties></Blob>"
    )
    rows = row.format(version="2026-01-01T00:00:00.0000000Z", etag="0x1")
    rows += row.format(version="2026-02-02T00:00:00.0000000Z", etag="0x2")
    listing = (
        f'<?xml version="1.0"?><EnumerationResults><Blobs>{rows}</Blobs><NextMarker/></EnumerationResults>'
    )

    def answers(request: Request) -> Reply:
        if "comp=list" in request.target:
            return Reply(200, {"Connection": "close", "Content-Type": "application/xml"}, listing.encode())
        headers = {"Connection": "close", "ETag": '"0x2"', "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
        return Reply(200, {**headers, "x-ms-version-id": "2026-02-02T00:00:00.0000000Z"}, b"content")

    with scripted(answers) as (url, _):
        store = open_store(MODEL, {"endpoint": url, "key": KEY})
        now = trio.run(store.locate, Entry("a", 7, "0x2"))
        before = trio.run(store.locate, Entry("a", 7, "0x1"))
        with pytest.raises(Stale):
            trio.run(store.locate, Entry("a", 7, "0x0"))
    assert "versionid=2026-02-02" in now.url.lower()
    assert "versionid=2026-01-01" in before.url.lower()
    assert (now.etag, before.etag) == ('"0x2"', '"0x1"')
    assert "sr=bv" in before.url


def test_without_credentials_the_message_says_how_to_have_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*arguments: object, **more: object) -> None:
        raise ClientAuthenticationError("DefaultAzureCredential failed: s3cret")

    monkeypatch.setenv("AZURE_CONFIG_DIR", str(tmp_path))
    for name in ("get_token", "get_token_info"):
        monkeypatch.setattr(DefaultAzureCredential, name, refuse)
    with pytest.raises(
        AccessDenied, match="no Azure credentials: set AZURE_STORAGE_CONNECTION_STRING"
    ) as caught:
        snapshot(f"az://{ACCOUNT}/{CONTAINER}/bert")
    assert "s3cret" not in str(caught.value)


def test_nothing_there_is_not_found(server: Azure) -> None:
    for url in (
        f"az://{ACCOUNT}/{CONTAINER}/none/",
        f"az://{ACCOUNT}/{CONTAINER}/none",
        f"az://{ACCOUNT}/nothing/x",
    ):
        with pytest.raises(NotFound, match=url):
            snapshot(url, connection_string=server.connection_string)


@pytest.mark.parametrize(
    "body",
    [b"<html>", b"", b"<?xml version='1.0'?><EnumerationResults><Blobs><Blob/></Blobs></EnumerationResults>"],
)
def test_answers_that_make_no_sense_become_store_errors(body: bytes) -> None:
    def answers(request: Request) -> Reply:
        return Reply(200, {"Connection": "close", "Content-Type": "application/xml"}, body)

    with scripted(answers) as (url, _), pytest.raises(StoreError, match=MODEL):
        snapshot(MODEL, endpoint=url, anonymous=True)


def test_the_endpoint_is_part_of_the_identity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AZURE_CONFIG_DIR", str(tmp_path))
    assert identity_of(open_store(MODEL)) == MODEL
    elsewhere = open_store(MODEL, {"endpoint": "http://127.0.0.1:10000/modelsofours/"})
    assert identity_of(elsewhere) == f"{MODEL} at http://127.0.0.1:10000/modelsofours"


@pytest.mark.parametrize(
    ("url", "options", "text"),
    [
        ("az://account", {}, "write az://ACCOUNT/CONTAINER/PREFIX/"),
        ("az://user:s3cret@account/container", {}, "write az://ACCOUNT/CONTAINER/PREFIX/"),
        (f"{MODEL}//b", {}, "is no place for a model"),
        (MODEL, {"region": "eu"}, "unknown option 'region'"),
        (MODEL, {"endpoint": "https://user:s3cret@host"}, "endpoint must look like"),
        (MODEL, {"connection_string": "s3cret"}, "the connection string is malformed"),
        (MODEL, {"expires": 0}, "'expires' must be positive"),
    ],
)
def test_mistakes_are_config_errors(url: str, options: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        open_store(url, options)
    assert "s3cret" not in str(caught.value)
