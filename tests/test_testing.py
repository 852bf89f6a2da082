"""modelfs.testing: its stores do what tests need, and the contract checker finds every broken promise."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from modelfs.errors import AccessDenied, BadAnswer, NotFound, Stale, StoreError, Unavailable
from modelfs.testing import FaultyStore, MemoryStore, check_store, read_span
from modelfs.types import Digest, Entry, Location, Snapshot, Span
from tests.stores.site import Reply, Request, file_reply, scripted

FILES = {"config.json": b"{}", "onnx/model.onnx": b"weights", "empty": b""}


class Broken(MemoryStore):
    """A good store; each subclass breaks one promise."""

    def __init__(self) -> None:
        super().__init__("memory://broken", FILES)


class NoVerbs:
    url = "x://y"


class PasswordInUrl(Broken):
    def __init__(self) -> None:
        super().__init__()
        self.url = "memory://user:password@broken"


class UrlIsAPath(Broken):
    def __init__(self) -> None:
        super().__init__()
        self.url = "/srv/models"


class SecretInUrl(Broken):
    def __init__(self) -> None:
        super().__init__()
        self.url = "memory://broken?token=s3cret"


class SecretInRepr(Broken):
    def __repr__(self) -> str:
        return "Broken(s3cret)"


class SecretInErrors(Broken):
    async def entry(self, path: str) -> Entry:
        try:
            return await super().entry(path)
        except NotFound as error:
            raise NotFound(f"s3cret: {error}") from error


class Edited(Broken):
    """A store whose listing is not what it holds."""

    def edit(self, entries: dict[str, Entry]) -> None:
        raise NotImplementedError

    async def snapshot(self) -> Snapshot:
        snapshot = await super().snapshot()
        entries = dict(snapshot.entries)
        self.edit(entries)
        return Snapshot(self.url, snapshot.revision, entries)


class Forgets(Edited):
    def edit(self, entries: dict[str, Entry]) -> None:
        del entries["empty"]


class Invents(Edited):
    def edit(self, entries: dict[str, Entry]) -> None:
        entries["z"] = Entry("z", 1, "v")


class Unsorted(Edited):
    def edit(self, entries: dict[str, Entry]) -> None:
        entries["empty"] = entries.pop("empty")


class WrongKey(Edited):
    def edit(self, entries: dict[str, Entry]) -> None:
        entries["onnx/model.onnx"] = replace(entries["onnx/model.onnx"], path="other")


class Hostile(Edited):
    def edit(self, entries: dict[str, Entry]) -> None:
        entries["x/../y"] = Entry("x/../y", 1, "v")


class NoVersion(Edited):
    def edit(self, entries: dict[str, Entry]) -> None:
        entries["empty"] = replace(entries["empty"], version="")


class WrongSize(Edited):
    def edit(self, entries: dict[str, Entry]) -> None:
        entries["config.json"] = replace(entries["config.json"], size=3)


class WrongDigest(Edited):
    def edit(self, entries: dict[str, Entry]) -> None:
        entries["config.json"] = replace(entries["config.json"], digest=Digest("md5", "0" * 32))


class NotOfJson(Edited):
    def edit(self, entries: dict[str, Entry]) -> None:
        entries["empty"] = replace(entries["empty"], mtime=float("nan"))


class OtherUrl(Broken):
    async def snapshot(self) -> Snapshot:
        return replace(await super().snapshot(), url="memory://elsewhere")


class NoRevision(Broken):
    async def snapshot(self) -> Snapshot:
        return replace(await super().snapshot(), revision="")


class Restless(Broken):
    count = itertools.count()

    async def snapshot(self) -> Snapshot:
        return replace(await super().snapshot(), revision=f"r{next(self.count)}")


class RestlessEntries(Broken):
    count = itertools.count()

    async def snapshot(self) -> Snapshot:
        snapshot = await super().snapshot()
        entries = {path: replace(e, mtime=float(next(self.count))) for path, e in snapshot.entries.items()}
        return replace(snapshot, entries=entries)


class EntryDisagrees(Broken):
    async def entry(self, path: str) -> Entry:
        return replace(await super().entry(path), version="latest")


class NoDirectories(Broken):
    async def entry(self, path: str) -> Entry:
        if path not in FILES:
            raise NotFound(f"no {path!r}")
        return await super().entry(path)


class PrefixesAreDirectories(Broken):
    async def entry(self, path: str) -> Entry:
        if path and any(name.startswith(path) for name in FILES if name != path):
            return Entry(path, kind="directory")
        return await super().entry(path)


class EverythingExists(Broken):
    async def entry(self, path: str) -> Entry:
        try:
            return await super().entry(path)
        except NotFound:
            return Entry(path, 1, "v")


class RaisesKeyError(Broken):
    async def entry(self, path: str) -> Entry:
        return (await self.snapshot()).entries[path]


class SnapshotFails(Broken):
    async def snapshot(self) -> Snapshot:
        raise Unavailable("come back later")


class LocateLeaks(Broken):
    async def locate(self, entry: Entry) -> Location:
        raise OSError("disk")


class WrongBytes(Broken):
    async def locate(self, entry: Entry) -> Location:
        return Location.inline(FILES[entry.path].upper())


class ShortBytes(Broken):
    async def locate(self, entry: Entry) -> Location:
        return Location.inline(FILES[entry.path][:-1])


class NoSuchScheme(Broken):
    async def locate(self, entry: Entry) -> Location:
        return Location("ftp://host/x")


class OneAtATime(Broken):
    busy = False

    async def locate(self, entry: Entry) -> Location:
        if self.busy:
            raise Unavailable("busy")
        self.busy = True
        try:
            await trio.lowlevel.checkpoint()
            return await super().locate(entry)
        finally:
            self.busy = False


class KeepsItsTurn(Broken):
    def __init__(self) -> None:
        super().__init__()
        self.turns = trio.Semaphore(1)

    async def locate(self, entry: Entry) -> Location:
        await self.turns.acquire()
        await trio.lowlevel.checkpoint()
        self.turns.release()
        return await super().locate(entry)


class CancelledInHalf(Broken):
    """A cancelled snapshot leaves half a listing behind."""

    async def snapshot(self) -> Snapshot:
        whole, self._files = self._files, {}
        await trio.lowlevel.checkpoint()
        self._files = whole
        return await super().snapshot()


class Hangs(Broken):
    async def locate(self, entry: Entry) -> Location:
        await trio.sleep_forever()
        raise AssertionError


BROKEN: Mapping[type, str] = {
    NoVerbs: r"lacks url, snapshot\(\), entry\(\) or locate\(\)",
    PasswordInUrl: "its url holds a password",
    UrlIsAPath: "its url has no scheme",
    SecretInUrl: "its url shows a secret",
    SecretInRepr: r"its repr\(\) shows a secret",
    SecretInErrors: r"the error of entry\('.*'\) shows a secret",
    Forgets: r"its snapshot lacks \['empty'\]",
    Invents: r"its snapshot shows \['z'\]",
    Unsorted: "not sorted",
    WrongKey: "its snapshot has 'other' at 'onnx/model.onnx'",
    Hostile: r"its snapshot shows 'x/\.\./y'",
    NoVersion: "'empty' has no version",
    WrongSize: "'config.json' has 2 bytes, its entry says 3",
    WrongDigest: "'config.json' has md5:99914b932bd37a50b983c5e7c90ae93b, its entry says md5:0000",
    NotOfJson: "two snapshots of one revision differ",
    OtherUrl: "its snapshot says 'memory://elsewhere' is its url",
    NoRevision: "its snapshot has no revision",
    Restless: "revisions differ",
    RestlessEntries: r"two snapshots of one revision differ, for example in \['config.json'",
    EntryDisagrees: r"entry\('config.json'\) has version 'latest', the snapshot",
    NoDirectories: r"entry\('onnx'\) raised NotFound: no 'onnx'",
    PrefixesAreDirectories: r"entry\('onn'\) is .*directory.* instead of NotFound",
    EverythingExists: r"entry\('.*'\) is Entry.* instead of NotFound",
    RaisesKeyError: r"raised KeyError\('onnx'\): only StoreErrors may leave a store",
    SnapshotFails: r"snapshot\(\) raised Unavailable: come back later",
    LocateLeaks: r"locate\('config.json'\) raised OSError\('disk'\): only StoreErrors",
    WrongBytes: "of 'onnx/model.onnx' has wrong bytes",
    ShortBytes: "raised BadAnswer: 1 bytes came instead of the 2 at offset 0",
    NoSuchScheme: "must be http",
    OneAtATime: r"locate\('config.json'\) raised Unavailable: busy",
    KeepsItsTurn: "no answer within 60 s while checking: A verb cancelled at any moment",
    CancelledInHalf: r"entry\('config.json'\) raised NotFound",
    Hangs: "no answer within 60 s while checking: Any span of any file",
}


def check(store: Any, clock: MockClock | None = None) -> None:
    trio.run(
        partial(check_store, store, FILES, secrets=("s3cret",)),
        clock=clock or MockClock(autojump_threshold=0),
    )


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_every_broken_promise_is_found(broken: type) -> None:
    with pytest.raises(AssertionError, match=BROKEN[broken]):
        check(broken())


def test_a_good_store_passes() -> None:
    check(Broken())


def test_a_store_too_large_to_list_is_asked_for_single_entries() -> None:
    class Huge(Broken):
        async def snapshot(self) -> Snapshot:
            return Snapshot.of(self.url, "r1", [], complete=False)

        async def entry(self, path: str) -> Entry:
            whole = await super().snapshot()
            return await MemoryStore(whole.url, FILES).entry(path)

    check(Huge())


def test_a_check_of_nothing_is_refused() -> None:
    with pytest.raises(AssertionError, match="at least one expected file"):
        trio.run(check_store, MemoryStore("memory://x", {}), {})


def test_the_checker_uses_the_reader_it_is_given() -> None:
    asked: list[Span] = []

    async def fetch(location: Location, span: Span) -> bytes:
        asked.append(span)
        return await read_span(location, span)

    trio.run(partial(check_store, Broken(), FILES, fetch=fetch))
    assert Span(0, 7) in asked


# ---- read_span


def read(location: Location, start: int, stop: int) -> bytes:
    return trio.run(read_span, location, Span(start, stop))


def test_spans_of_data_urls() -> None:
    assert read(Location("data:,hello%20world"), 4, 8) == b"o wo"
    assert read(Location.inline(b"\0\xff\n"), 1, 3) == b"\xff\n"
    with pytest.raises(BadAnswer, match="3 bytes came instead of the 4"):
        read(Location.inline(b"abc"), 0, 4)


@pytest.mark.parametrize(
    ("headers", "error"),
    [({"ETag": '"other"'}, Stale), ({"Last-Modified": "Thu, 01 Jan 1970 00:00:00 GMT"}, Stale)],
)
def test_a_server_that_ignores_the_pin_is_found_out(headers: dict[str, str], error: type[StoreError]) -> None:
    def answers(request: Request) -> Reply:
        return Reply(
            200, {"ETag": '"e"', "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT", **headers}, b"data"
        )

    with scripted(answers) as (url, _), pytest.raises(error):
        read(Location(url, etag='"e"', last_modified="Wed, 21 Oct 2015 07:28:00 GMT"), 0, 4)


def test_ranges_and_whole_answers_are_both_understood() -> None:
    with scripted(lambda request: file_reply(b"0123456789", request)) as (url, requests):
        assert read(Location(url, {"X-Key": "k"}), 3, 7) == b"3456"
        assert (requests[0].headers["range"], requests[0].headers["x-key"]) == ("bytes=3-6", "k")
    with scripted(lambda _: Reply(200, {}, b"0123456789")) as (url, _):
        assert read(Location(url), 3, 7) == b"3456"
    with scripted(lambda _: Reply(403)) as (url, _), pytest.raises(AccessDenied):
        read(Location(url), 3, 7)


# ---- MemoryStore


def test_a_memory_store_changes_between_snapshots() -> None:
    async def main() -> None:
        store = MemoryStore("memory://m", {"a": b"1", "b": b"2"})
        first = await store.snapshot()
        store.put("a", b"new")
        store.remove("b")
        store.put("c/d", b"4")
        second = await store.snapshot()
        assert list(second.entries) == ["a", "c/d"]
        assert first.revision != second.revision
        for path in ("a", "b"):
            with pytest.raises(Stale, match="refresh the model"):
                await store.locate(first.entries[path])
        store.put("a", b"1")
        assert (await store.snapshot()).entries["a"] == first.entries["a"], "the same bytes, the same version"
        with pytest.raises(KeyError):
            store.remove("nothing")

    trio.run(main)


def test_a_memory_store_copies_what_it_is_given_and_can_hide_digests() -> None:
    files = {"a": b"1"}
    store = MemoryStore("memory://m", files, digests=False, mtime=5.0)
    files["b"] = b"2"
    (entry,) = trio.run(store.snapshot).entries.values()
    assert (entry.path, entry.digest, entry.mtime) == ("a", None, 5.0)


# ---- FaultyStore


def test_a_faulty_store_fails_as_planned() -> None:
    async def main() -> None:
        busy, gone = Unavailable("busy", retry_after=3), NotFound("gone")
        inner = MemoryStore("memory://m", {"a": b"1"})
        store = FaultyStore(inner, {"snapshot": [None, busy], "locate": itertools.repeat(gone)})
        assert store.url == inner.url
        snapshot = await store.snapshot()
        with pytest.raises(Unavailable) as caught:
            await store.snapshot()
        assert caught.value is busy
        assert await store.snapshot() == snapshot
        entry = await store.entry("a")
        for _ in range(3):
            with pytest.raises(NotFound):
                await store.locate(entry)
        assert store.calls == {"snapshot": 3, "entry": 1, "locate": 3}

    trio.run(main)


def test_importing_it_needs_nothing_but_modelfs() -> None:
    heavy = "{'pytest', 'moto', 'boto3', 'torch', 'transformers', 'numpy', 'sklearn', 'huggingface_hub'}"
    script = f"import sys, modelfs.testing; print(sorted({heavy} & sys.modules.keys()))"
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
