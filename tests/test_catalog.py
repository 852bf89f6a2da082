"""The models of a mount: pins, identities, and what is kept for the next start."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import pytest
import trio

import modelfs.catalog
from modelfs.cache import Cache
from modelfs.catalog import Catalog
from modelfs.errors import NotFound, Unavailable
from modelfs.fetch.chain import standing
from modelfs.fetch.client import RangeClient
from modelfs.fetch.engine import Fetcher
from modelfs.lockfile import Lock, LockedModel
from modelfs.metrics import Metrics
from modelfs.stores import Options, entry_in
from modelfs.tree import Change, Directory, File, Node, Tree
from modelfs.types import BLOCK, Digest, Entry, Location, Snapshot
from modelfs.views import Face
from modelfs.views.filters import filtered


class Shelf:
    """A store in memory that can be out of reach and pins its files weakly, like an ETag, or by digests."""

    def __init__(
        self, url: str, files: Mapping[str, bytes], identity: str | None = None, *, digests: bool = False
    ) -> None:
        self.url = url
        self.identity = identity or url
        self.files = files
        self.reachable = True
        self.gone = False
        self.digests = digests
        self.listed = self.located = 0

    async def snapshot(self) -> Snapshot:
        if not self.reachable:
            raise Unavailable(f"{self.url} is out of reach")
        self.listed += 1
        if self.gone:
            raise NotFound(f"{self.url} does not exist")
        return Snapshot.of(self.url, "", [self._entry(path, data) for path, data in self.files.items()])

    def _entry(self, path: str, data: bytes) -> Entry:
        digest = Digest("sha256", sha256(data).hexdigest()) if self.digests else None
        return Entry(path, len(data), f"1 at {self.url}" if self.digests else "1", digest)

    async def entry(self, path: str) -> Entry:
        return entry_in(await self.snapshot(), path)

    async def locate(self, entry: Entry) -> Location:
        if not self.reachable:
            raise Unavailable(f"{self.url} is out of reach")
        self.located += 1
        return Location.inline(self.files[entry.path])


@asynccontextmanager
async def catalog(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    stores: Mapping[str, Shelf],
    *,
    fallbacks: Mapping[str, Sequence[str]] | None = None,
    limit: int | None = None,
    pinned: frozenset[str] = frozenset(),
    face: Face | None = None,
    lock: Lock | None = None,
    told: list[Change] | None = None,
) -> AsyncIterator[tuple[Catalog, Cache]]:
    """A started catalog with one model for each of `stores` that is not among the `fallbacks` of another.

    With `told` it takes a mount over, and that gets what it has the kernel look up anew.
    """
    metrics = Metrics()
    cache = Cache(directory, limit=limit, metrics=metrics)
    client = RangeClient(metrics=metrics)

    def opened(url: str, options: Options) -> Shelf:
        return stores[url]

    def changed(changes: list[Change]) -> None:
        if told is not None:
            told.extend(changes)

    monkeypatch.setattr(modelfs.catalog, "open_store", opened)
    try:
        async with trio.open_nursery() as nursery:
            fetcher = Fetcher(nursery, cache, client, metrics)
            own = Catalog(Tree(), cache, fetcher, metrics, lambda url: {}, changed, lock)
            behind = fallbacks or {}
            for name in stores.keys() - {url for urls in behind.values() for url in urls}:
                others = [(url, {}) for url in behind.get(name, ())]
                own.add(name, name, {}, fallbacks=others, pinned=name in pinned, face=face)
            await own.start(nursery, keep_going=True, at_once=told is not None)
            yield own, cache
            nursery.cancel_scope.cancel()
    finally:
        client.close()
        cache.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        with trio.fail_after(30):
            await test()

    trio.run(limited)


def node_at(own: Catalog, *path: str) -> Node:
    node: Node = own.tree.root
    for name in path:
        assert isinstance(node, Directory)
        node = node.children[name]
    return node


async def content(own: Catalog, *path: str) -> bytes:
    node: Any = node_at(own, *path)
    assert isinstance(node, File)
    reader, _ = await own.files.open(node)
    try:
        return bytes(await reader.read(0, node.entry.size))
    finally:
        reader.close()


def test_a_pinned_model_is_not_evicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = {
        "keep": Shelf("memory://keep", {"w": b"1" * BLOCK}),
        "drop": Shelf("memory://drop", {"w": b"2" * BLOCK}),
    }

    async def test() -> None:
        async with catalog(tmp_path, monkeypatch, stores, pinned=frozenset({"keep"})) as (own, cache):
            for name in stores:
                await content(own, name, "w")
            kept, dropped = (node_at(own, name, "w") for name in stores)
            assert isinstance(kept, File)
            assert isinstance(dropped, File)
            while sum(own.files.cached_bytes(n.model, n.entry) for n in (kept, dropped)) < 2 * BLOCK:  # noqa: ASYNC110
                await trio.sleep(0.01)  # a thread makes the last block part of the cache
            cache.limit = 0
            while own.files.cached_bytes(dropped.model, dropped.entry):  # it is closed in a thread
                await trio.to_thread.run_sync(cache.make_room, 0)
            assert own.files.cached_bytes(kept.model, kept.entry) == BLOCK
        # Not pinned any more, it may go.
        async with catalog(tmp_path, monkeypatch, stores) as (own, cache):
            assert cache.usage().pinned == 0

    run(test)


def test_pins_follow_a_refresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        stores = {"m": Shelf("memory://m", {"a": b"old", "b": b"same"})}
        async with catalog(tmp_path, monkeypatch, stores, pinned=frozenset({"m"})) as (own, cache):
            before = {own.models["m"].source.key(entry) for entry in _entries(own)}
            assert all(cache.pinned(key) for key in before)
            own.models["m"].source.store = Shelf("memory://m", {"a": b"newer", "b": b"same"})
            await own.refresh("m")
            after = {own.models["m"].source.key(entry) for entry in _entries(own)}
            assert len(before & after) == 1
            assert all(cache.pinned(key) for key in after)
            assert not any(cache.pinned(key) for key in before - after)

    run(test)


def _entries(own: Catalog) -> list[Any]:
    snapshot = own.models["m"].snapshot
    assert snapshot is not None
    return list(snapshot.entries.values())


def test_two_places_with_one_url_are_two_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Shelf("s3://models/", {"w": b"here "}, "s3://models/ at http://here")
    there = Shelf("s3://models/", {"w": b"there"}, "s3://models/ at http://there")

    async def test() -> None:
        for shelf, expected in ((here, b"here "), (there, b"there"), (here, b"here ")):
            shelf.reachable = True
            async with catalog(tmp_path, monkeypatch, {"m": shelf}) as (own, _):
                assert await content(own, "m", "w") == expected
        # And without network each start shows its own, or nothing.
        there.reachable = False
        async with catalog(tmp_path, monkeypatch, {"m": there}) as (own, _):
            assert await content(own, "m", "w") == b"there"

    run(test)


def test_a_start_out_of_reach_shows_no_other_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Shelf("s3://models/", {"w": b"here "}, "s3://models/ at http://here")
    there = Shelf("s3://models/", {"w": b"there"}, "s3://models/ at http://there")
    there.reachable = False
    monkeypatch.setattr(modelfs.catalog, "RESOLVE_SECONDS", 0.0)

    async def test() -> None:
        async with catalog(tmp_path, monkeypatch, {"m": here}) as (own, _):
            assert await content(own, "m", "w") == b"here "
        async with catalog(tmp_path, monkeypatch, {"m": there}) as (own, _):
            assert own.models["m"].state == "unavailable"
            assert "m" not in own.tree.root.children

    run(test)


class Huge(Shelf):
    """A store that is too large to list."""

    async def snapshot(self) -> Snapshot:
        return Snapshot.of(self.url, "", [], complete=False)

    async def entry(self, path: str) -> Entry:
        return entry_in(await super().snapshot(), path)


def test_globs_hold_for_a_store_too_large_to_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = {"m": Huge("memory://m", {"sub/a.json": b"{}", "sub/a.bin": b"weights"})}

    async def test() -> None:
        face = Face(include=("*.json",), latest="sub")
        async with catalog(tmp_path, monkeypatch, stores, face=face) as (own, _):
            directory: Any = await own.find(cast("Any", node_at(own, "m")), "sub")
            assert await own.find(directory, "a.bin") is None
            assert isinstance(await own.find(directory, "a.json"), File)
            assert await content(own, "m", "sub", "a.json") == b"{}"

    run(test)


def test_a_locked_model_may_change_where_it_is_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    face = Face(exclude=("*.md",))
    store = Shelf("memory://m", {"v1.0/w": b"1", "README.md": b"old"})

    async def test() -> None:
        locked = LockedModel.of(filtered(face, await store.snapshot()))
        lock = Lock(tmp_path / "lock", {"m": locked})
        store.files = {"v1.0/w": b"1", "README.md": b"newer"}
        async with catalog(tmp_path / "cache", monkeypatch, {"m": store}, face=face, lock=lock) as (own, _):
            assert own.models["m"].why is None
            assert set(cast("Any", node_at(own, "m")).children) == {"v1.0", "latest"}
            store.files = {"v1.0/w": b"22"}
            await own.refresh("m")
            assert "v1.0/w: expected 1 byte" in (own.models["m"].why or "")

    run(test)


def test_a_version_that_is_not_there_is_the_reason_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = {"m": Shelf("memory://m", {"v1.0/w": b"1"})}

    async def test() -> None:
        async with catalog(tmp_path, monkeypatch, stores, face=Face(latest="v2.0")) as (own, _):
            assert own.models["m"].state == "unavailable"
            assert "has no directory 'v2.0'" in (own.models["m"].why or "")

    run(test)


class Artifacts(Shelf):
    """A registry's artifact: its files have digests."""

    async def snapshot(self) -> Snapshot:
        if not self.reachable:
            raise Unavailable(f"{self.url} is out of reach")
        digests = {path: Digest("sha256", sha256(data).hexdigest()) for path, data in self.files.items()}
        entries = [Entry(path, len(data), "1", digests[path]) for path, data in self.files.items()]
        return Snapshot.of(self.url, "", entries)


def test_artifacts_for_ollama_are_laid_out_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = json.dumps({"layers": [{"mediaType": "application/vnd.ollama.image.model"}]}).encode()
    stores = {
        "tiny": Artifacts(
            "oci://registry.local/me/tiny:1b",
            {".oci/manifest.json": manifest, ".oci/config.json": b"{}", "model.gguf": b"GGUF"},
        ),
        "image": Artifacts("oci://registry.local/me/image:1", {".oci/manifest.json": b'{"layers": []}'}),
    }
    name = f"sha256-{sha256(b'GGUF').hexdigest()}"

    async def test() -> None:
        for _ in range(2):  # the second time from the disk
            async with catalog(tmp_path, monkeypatch, stores) as (own, _):
                models = (".ollama", "models")
                assert (
                    await content(own, *models, "manifests", "registry.local", "me", "tiny", "1b") == manifest
                )
                assert await content(own, *models, "blobs", name) == b"GGUF"
                named = node_at(own, *models, "manifests", "registry.local", "me")
                assert isinstance(named, Directory)
                assert set(named.children) == {"tiny"}
                blob, plain = node_at(own, *models, "blobs", name), node_at(own, "tiny", "model.gguf")
                assert isinstance(blob, File)
                assert isinstance(plain, File)
                assert blob.entry == plain.entry
                assert blob.ino != plain.ino
            for store in stores.values():
                store.reachable = False

    run(test)


def test_who_takes_a_mount_over_tells_what_its_predecessor_may_not_have_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf("memory://m", {"d/old": b"1"})

    async def test() -> None:
        async with catalog(tmp_path, monkeypatch, {"m": shelf}) as (own, _):
            shelf.files = {"d/new": b"22"}
            await own.refresh()
        # It had saved the new snapshot, and died before it could tell the kernel.
        told: list[Change] = []
        async with catalog(tmp_path, monkeypatch, {"m": shelf}, told=told) as (own, _):
            directory = node_at(own, "m", "d").ino
        assert {Change(directory, "old"), Change(directory, "new")} <= {*told}

    run(test)


# -- fallback chains


def pair(files: Mapping[str, bytes], others: Mapping[str, bytes], *, digests: bool) -> dict[str, Shelf]:
    """Return the model ``a``, and the store ``b`` to be behind it."""
    return {
        "a": Shelf("memory://a", files, digests=digests),
        "b": Shelf("memory://b", others, digests=digests),
    }


BEHIND = {"a": ["b"]}


def serving(own: Catalog) -> list[tuple[str, bool]]:
    return [(row["state"], row["serving"]) for row in standing(own.models["a"].source)]


def test_the_next_store_gives_its_snapshot_while_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = pair({"w": b"1"}, {"w": b"two"}, digests=False)
    stores["a"].reachable = False

    async def test() -> None:
        async with catalog(tmp_path, monkeypatch, stores, fallbacks=BEHIND) as (own, _):
            assert await content(own, "a", "w") == b"two"
            report = await own.files.report(own.models["a"])
            assert (report["source"], report["why"], report["offline"]) == ("memory://b", None, False)
            assert serving(own) == [("failing", False), ("ready", True)]
            assert "out of reach" in report["sources"][0]["why"]
            node: Any = node_at(own, "a", "w")
            stores["a"].reachable = True
            await own.refresh("a")
            assert await content(own, "a", "w") == b"1"
            assert serving(own) == [("ready", True), ("ready", False)]
            # What was open or known before stays what it was.
            reader, _ = await own.files.open(node)
            assert bytes(await reader.read(0, 3)) == b"two"
            reader.close()
            assert own.files.attributes(node)["user.modelfs.source"]() == "memory://b"

    run(test)


def test_an_outage_keeps_the_snapshot_and_reads_through_the_next_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = pair({"v": b"1", "w": b"2"}, {"w": b"2", "x": b"3"}, digests=True)

    async def test() -> None:
        async with catalog(tmp_path, monkeypatch, stores, fallbacks=BEHIND) as (own, _):
            before = node_at(own, "a", "w").ino
            stores["a"].reachable = False
            await own.refresh("a")
            assert stores["b"].listed == 0
            assert await content(own, "a", "w") == b"2"
            assert (stores["b"].listed, stores["b"].located) == (1, 1)
            assert node_at(own, "a", "w").ino == before
            assert own.models["a"].source.url == "memory://a"
            assert "out of reach" in str(own.models["a"].why)

    run(test)


def test_an_offline_start_shows_what_was_shown_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = pair({"w": b"1"}, {"w": b"two"}, digests=False)

    async def test() -> None:
        for first_reachable, expected in ((True, b"1"), (False, b"two")):
            stores["a"].gone = not first_reachable
            async with catalog(tmp_path, monkeypatch, stores, fallbacks=BEHIND) as (own, _):
                assert await content(own, "a", "w") == expected
            for store in stores.values():
                store.reachable = False
            async with catalog(tmp_path, monkeypatch, stores, fallbacks=BEHIND) as (own, _):
                assert own.models["a"].offline
                assert await content(own, "a", "w") == expected
            for store in stores.values():
                store.reachable = True

    run(test)


def test_a_first_store_that_is_gone_for_good_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = pair({"w": b"1"}, {"w": b"two"}, digests=False)

    async def test() -> None:
        async with catalog(tmp_path, monkeypatch, stores, fallbacks=BEHIND) as (own, _):
            stores["a"].gone = True
            await own.refresh("a")
            assert await content(own, "a", "w") == b"two"

    run(test)


def test_equal_content_of_another_store_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = pair({"w": b"1"}, {"w": b"1"}, digests=True)

    async def test() -> None:
        async with catalog(tmp_path, monkeypatch, stores, fallbacks=BEHIND) as (own, _):
            before = node_at(own, "a", "w").ino
            for gone in (True, False):
                stores["a"].gone = gone
                await own.refresh("a")
                assert node_at(own, "a", "w").ino == before
                assert own.models["a"].source.url == "memory://a"
                assert own.models["a"].why is None
            stores["a"].files = {"w": b"new"}
            await own.refresh("a")
            assert await content(own, "a", "w") == b"new"

    run(test)


def test_models_of_one_store_share_its_breaker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf("memory://x", {})
    stores = {"a": shelf, "b": shelf, "c": Shelf("memory://x", {}, "memory://x elsewhere")}

    async def test() -> None:
        async with catalog(tmp_path, monkeypatch, stores) as (own, _):
            a, b, c = (own.models[name].source.breaker for name in "abc")
            assert a is b
            assert a is not c

    run(test)
