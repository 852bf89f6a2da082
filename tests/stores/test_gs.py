"""gs:// in detail: generations, credentials that rotate, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from modelfs.errors import AccessDenied, ConfigError, NotFound, Stale, StoreError, Unavailable
from modelfs.stores import identity_of, open_store
from modelfs.testing import read_span
from modelfs.types import Digest, Entry, Location, Snapshot, Span
from tests.stores.gcs import BUCKET, Gcs, gcs
from tests.stores.site import Reply, Request, scripted


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Gcs]:
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "STORAGE_EMULATOR_HOST"):
        monkeypatch.delenv(name, raising=False)
    with gcs() as own:
        yield own


def snapshot(url: str, **options: object) -> Snapshot:
    return trio.run(open_store(url, options).snapshot)


def test_an_object_that_is_overwritten_while_it_is_read_is_stale(server: Gcs) -> None:
    generation = server.put("bert/model.bin", b"old content")
    store = open_store(f"gs://{BUCKET}/bert/", {"endpoint": server.url, "anonymous": True})

    async def read() -> None:
        entry = (await store.snapshot()).entries["model.bin"]
        assert entry.version == generation
        location = await store.locate(entry)
        assert await read_span(location, Span(0, 3)) == b"old"
        server.put("bert/model.bin", b"new content")
        with pytest.raises(Stale):
            await read_span(location, Span(4, 11))
        assert (await store.entry("model.bin")).version != generation

    trio.run(read)


def test_the_digest_is_the_crc32c_or_for_want_of_it_the_md5(server: Gcs) -> None:
    server.put("bert/a", b"hello")
    server.put("bert/b", b"hello", crc32c="")
    found = snapshot(f"gs://{BUCKET}/bert", endpoint=server.url, anonymous=True).entries
    assert found["a"].digest == Digest("crc32c", "9a71bb4c")
    assert found["b"].digest == Digest("md5", "5d41402abc4b2a76b9719d911017c592")


def test_what_is_sent_decompressed_is_not_shown(server: Gcs) -> None:
    server.put("bert/a", b"hello", contentEncoding="gzip")
    server.put("bert/b", b"hello", contentEncoding="gzip", cacheControl="public, no-transform")
    store = open_store(f"gs://{BUCKET}/bert", {"endpoint": server.url, "anonymous": True})
    found = trio.run(store.snapshot)
    assert list(found.entries) == ["b"]
    assert [path for path, reason in found.rejected if "gzip" in reason] == ["a"]
    with pytest.raises(AccessDenied, match="no-transform"):
        trio.run(store.entry, "a")


def test_a_larger_model_is_looked_up_name_by_name(server: Gcs) -> None:
    for number in range(6):
        server.put(f"bert/{number}", b"x")
    store = open_store(f"gs://{BUCKET}/bert", {"endpoint": server.url, "anonymous": True, "max_entries": 5})
    assert not trio.run(store.snapshot).complete
    assert trio.run(store.entry, "5").size == 1
    with pytest.raises(NotFound):
        trio.run(store.entry, "6")


def test_a_key_that_ends_with_a_slash_is_a_directory(server: Gcs) -> None:
    server.put("bert/a", b"x")
    server.storage.objects[BUCKET]["bert/"] = {**server.storage.objects[BUCKET]["bert/a"], "name": "bert/"}
    server.storage.objects[BUCKET]["bert/d/"] = {
        **server.storage.objects[BUCKET]["bert/a"],
        "name": "bert/d/",
    }
    found = snapshot(f"gs://{BUCKET}/bert", endpoint=server.url, anonymous=True).entries
    assert {path: entry.kind for path, entry in found.items()} == {"a": "file", "d": "directory"}


def test_a_lone_object_and_one_in_a_directory_of_its_name_are_not_confused(server: Gcs) -> None:
    server.put("bert/model.bin", b"alone")
    store = open_store(f"gs://{BUCKET}/bert/model.bin", {"endpoint": server.url, "anonymous": True})

    async def read(entry: Entry) -> bytes:
        return await read_span(await store.locate(entry), Span(0, entry.size))

    alone = trio.run(store.snapshot).entries["model.bin"]
    assert trio.run(read, alone) == b"alone"
    server.put("bert/model.bin/model.bin", b"inside")
    inside = trio.run(store.snapshot).entries["model.bin"]
    assert trio.run(read, inside) == b"inside"
    assert trio.run(read, alone) == b"alone"
    for key in ("bert/model.bin", "bert/model.bin/model.bin"):
        server.delete(key)
    with pytest.raises(Stale):
        trio.run(read, alone)


def test_credentials_are_read_again_when_their_file_is_written(
    server: Gcs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.put("bert/a", b"content")
    server.tokens.append("first")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(server.account(tmp_path / "key.json", "first")))
    store = open_store(f"gs://{BUCKET}/bert", {"endpoint": server.url})

    async def bearer() -> Location:
        entry = (await store.snapshot()).entries["a"]
        location = await store.locate(entry)
        assert await read_span(location, Span(0, 7)) == b"content"
        return location

    location = trio.run(bearer)
    assert location.headers["authorization"] == "Bearer first"
    assert location.expires is not None
    server.tokens[:] = ["second"]
    with pytest.raises(AccessDenied) as caught:
        trio.run(store.snapshot)
    assert "first" not in str(caught.value)
    server.account(tmp_path / "key.json", "second")
    assert trio.run(bearer).headers["authorization"] == "Bearer second"


def test_an_emulator_gets_no_credentials(
    server: Gcs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.put("bert/a", b"content")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(server.account(tmp_path / "key.json", "unused")))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url.removeprefix("http://"))
    store = open_store(f"gs://{BUCKET}/bert")
    location = trio.run(store.locate, trio.run(store.snapshot).entries["a"])
    assert not location.headers
    assert identity_of(store) == f"gs://{BUCKET}/bert at {server.url}"


def test_who_pays_is_told(server: Gcs) -> None:
    server.put("bert/a", b"content")
    store = open_store(
        f"gs://{BUCKET}/bert", {"endpoint": server.url, "anonymous": True, "user_project": "ours"}
    )
    location = trio.run(store.locate, trio.run(store.snapshot).entries["a"])
    assert "userProject=ours" in location.url
    assert [r for r in server.requests if "/o?" in r and "userProject=ours" not in r] == []


def test_nothing_there_is_not_found(server: Gcs) -> None:
    for url in (f"gs://{BUCKET}/none/", f"gs://{BUCKET}/none", "gs://no-such-bucket/x"):
        with pytest.raises(NotFound, match=url):
            snapshot(url, endpoint=server.url, anonymous=True)


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (Reply(403), AccessDenied),
        (Reply(401), AccessDenied),
        (Reply(400), StoreError),
        (Reply(200, body=b'{"items": [{"name": "bert/a"}]}'), StoreError),
        (Reply(200, body=b'{"items": [{"name": 7, "size": "x", "generation": "1"}]}'), StoreError),
        (Reply(200, body=b'{"nextPageToken": "again"}'), StoreError),
        (Reply(200, body=b"[]"), StoreError),
        (Reply(200, body=b"<html>"), StoreError),
    ],
)
def test_answers_that_are_refusals_or_nonsense_become_store_errors(
    reply: Reply, error: type[StoreError]
) -> None:
    def answers(request: Request) -> Reply:
        return replace(reply, headers={"Connection": "close"})

    with scripted(answers) as (url, _), pytest.raises(error, match="gs://models-of-ours/bert"):
        snapshot(f"gs://{BUCKET}/bert", endpoint=url, anonymous=True, max_entries=10)


def test_a_server_that_is_not_there_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelfs.stores.gs._RETRYING", 0.5)
    with pytest.raises(Unavailable, match="cannot be reached"):
        snapshot(f"gs://{BUCKET}/bert", endpoint="http://127.0.0.1:9", anonymous=True)


@pytest.mark.parametrize(
    ("url", "options", "text"),
    [
        ("gs://", {}, "write gs://BUCKET/PREFIX/"),
        ("gs://user:s3cret@bucket/x", {}, "write gs://BUCKET/PREFIX/"),
        ("gs://bucket/a//b", {}, "is no place for a model"),
        ("gs://bucket/x", {"region": "eu"}, "unknown option 'region'"),
        ("gs://bucket/x", {"endpoint": "https://user:s3cret@host"}, "endpoint must look like"),
        ("gs://bucket/x", {"max_entries": 0}, "'max_entries' must be positive"),
    ],
)
def test_mistakes_are_config_errors(url: str, options: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        open_store(url, options)
    assert "s3cret" not in str(caught.value)
