"""The contract of a store as a checker: run it on yours in one line of a test.

``trio.run(check_store, store, expected)`` asks the store everything that the daemon relies on and raises
AssertionError with what was promised and what came instead.
"""

from __future__ import annotations

import base64
import functools
import json
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes, urlsplit

import httpx
import trio

from modelfs.errors import AccessDenied, BadAnswer, NotFound, Stale, StoreError, Unavailable
from modelfs.stores import Store
from modelfs.types import Entry, Location, Snapshot, Span, path_fault

Fetch = Callable[[Location, Span], Awaitable[bytes]]
"""Reads one span of a location, as `read_span` does."""

DEADLINE = 60.0
"""Seconds that any single promise may take before the store counts as hanging."""

T = TypeVar("T")


async def check_store(
    store: Store, expected: Mapping[str, bytes], *, fetch: Fetch | None = None, secrets: tuple[str, ...] = ()
) -> None:
    """Check that `store` keeps the contract of :class:`modelfs.stores.Store`.

    The store must not change while it is checked.

    Args:
        store: what to check; nothing is closed.
        expected: the content of every file that it holds, by path; at least one file.
        fetch: reads the spans of locations; `read_span` if None.
        secrets: strings that the store was configured with and must never show.

    Raises:
        AssertionError: the first promise that is broken, in words.

    """
    check = _Check(store, expected, fetch or read_span, secrets)
    if not expected:
        raise AssertionError("check_store needs at least one expected file")
    if not isinstance(store, Store):
        raise AssertionError(f"{store!r} lacks url, snapshot(), entry() or locate()")
    for promise in _PROMISES:
        with trio.move_on_after(DEADLINE) as scope:
            await promise(check)
        late = f"no answer within {DEADLINE:.0f} s while checking: {promise.__doc__}"
        check.must(not scope.cancelled_caught, late)


async def read_span(location: Location, span: Span) -> bytes:
    """Return the bytes `span` of `location`: small and slow, the reference for the daemon's range client.

    Raises:
        Stale: the content is not the pinned one any more.
        StoreError: anything else that went wrong.

    """
    if not len(span):
        return b""
    if location.parts:
        pieces = location.pieces(span, sum(size for size, _ in location.parts))
        return b"".join([await read_span(piece.location, piece.span) for piece in pieces])
    scheme = urlsplit(location.url).scheme
    readers = {"data": _read_data, "file": _read_file, "http": _read_http, "https": _read_http}
    if scheme in readers:
        data = await readers[scheme](location, span)
    elif location.reader is not None:
        data = await trio.to_thread.run_sync(location.reader, span)
    else:
        raise BadAnswer(f"a location must be http(s)://, file:// or data:, or have a reader, not {scheme!r}")
    if len(data) != len(span):
        raise BadAnswer(f"{len(data)} bytes came instead of the {len(span)} at offset {span.start}")
    return data


async def _read_data(location: Location, span: Span) -> bytes:
    head, _, body = location.url.partition(",")
    raw = unquote_to_bytes(body)
    whole = base64.b64decode(raw, validate=True) if head.endswith(";base64") else raw
    return whole[span.start : span.stop]


async def _read_file(location: Location, span: Span) -> bytes:
    path = os.fsdecode(unquote_to_bytes(os.fsencode(urlsplit(location.url).path)))
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise Stale(f"{path}: {error.strerror}") from error
    try:
        stat = os.fstat(descriptor)
        token = f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}"
        if token != location.token:
            raise Stale(f"{path} is {token}, pinned was {location.token}")
        return os.pread(descriptor, len(span), span.start)
    finally:
        os.close(descriptor)


_tls = functools.cache(httpx.create_ssl_context)  # reading the authorities' certificates takes 40 ms


async def _read_http(location: Location, span: Span) -> bytes:
    headers = {"accept-encoding": "identity", **location.headers}
    headers["range"] = f"bytes={span.start}-{span.stop - 1}"
    if location.etag:
        headers["if-match"] = location.etag
    try:
        async with httpx.AsyncClient(verify=_tls(), follow_redirects=True) as client:
            answer = await client.get(location.url, headers=headers)
    except httpx.HTTPError as error:
        raise Unavailable(f"range request failed: {type(error).__name__}") from error
    match answer.status_code:
        case 206:
            data = answer.content
        case 200:
            data = answer.content[span.start : span.stop]
        case 412 | 404 | 410:
            raise Stale(f"range request answered {answer.status_code}")
        case status:
            raise AccessDenied(f"range request answered {status}")
    for name, pinned in (("etag", location.etag), ("last-modified", location.last_modified)):
        if pinned and answer.headers.get(name) != pinned:
            raise Stale(f"the {name} is {answer.headers.get(name)!r}, pinned was {pinned!r}")
    return data


@dataclass(frozen=True)
class _Check:
    """A store under test, with verbs that turn every failure into an AssertionError that says where."""

    store: Store
    expected: Mapping[str, bytes]
    fetch: Fetch
    secrets: tuple[str, ...]

    def fault(self, text: str) -> AssertionError:
        return AssertionError(f"{self.store.url}: {text}")

    def must(self, holds: object, text: str) -> None:
        if not holds:
            raise self.fault(text)

    async def call(self, name: str, verb: Callable[[], Awaitable[T]]) -> T:
        try:
            return await verb()
        except StoreError as error:
            raise self.fault(f"{name} raised {type(error).__name__}: {error}") from error
        except Exception as error:
            raise self.fault(f"{name} raised {error!r}: only StoreErrors may leave a store") from error

    async def snapshot(self) -> Snapshot:
        return await self.call("snapshot()", self.store.snapshot)

    async def entry(self, path: str) -> Entry:
        return await self.call(f"entry({path!r})", lambda: self.store.entry(path))

    async def locate(self, entry: Entry) -> Location:
        return await self.call(f"locate({entry.path!r})", lambda: self.store.locate(entry))

    async def read(self, path: str, location: Location, span: Span) -> bytes:
        return await self.call(f"reading {span} of {path!r}", lambda: self.fetch(location, span))

    async def whole(self, entry: Entry) -> bytes:
        return await self.read(entry.path, await self.locate(entry), Span(0, entry.size))

    async def files(self) -> Mapping[str, Entry]:
        """Return the entries of all files, one by one from a store that is too large to list."""
        snapshot = await self.snapshot()
        if not snapshot.complete:
            return {path: await self.entry(path) for path in self.expected}
        return {path: entry for path, entry in snapshot.entries.items() if entry.kind == "file"}

    def parents(self) -> list[str]:
        parts = [path.split("/") for path in self.expected]
        return sorted({"/".join(p[:depth]) for p in parts for depth in range(1, len(p))})

    def show_no_secret(self, where: str, shown: str) -> None:
        self.must(not any(secret in shown for secret in self.secrets), f"{where} shows a secret")


async def _it_has_an_identity(check: _Check) -> None:
    """A store's url is its identity and no secret."""
    store = check.store
    url = urlsplit(store.url)
    check.must(url.scheme, "its url has no scheme")
    check.must(url.password is None, "its url holds a password")
    check.show_no_secret("its url", store.url)
    check.show_no_secret("its repr()", repr(store))


async def _the_snapshot_is_complete(check: _Check) -> None:
    """A snapshot lists exactly the files there are, in order, with safe names."""
    snapshot = await check.snapshot()
    check.must(snapshot.url == check.store.url, f"its snapshot says {snapshot.url!r} is its url")
    check.must(snapshot.revision, "its snapshot has no revision")
    check.show_no_secret("its snapshot", repr(snapshot))
    names = list(snapshot.entries)
    check.must(names == sorted(names), "its snapshot is not sorted: build it with Snapshot.of")
    for path, entry in snapshot.entries.items():
        check.must(path == entry.path, f"its snapshot has {entry.path!r} at {path!r}")
        check.must(not path_fault(path), f"its snapshot shows {path!r}: {path_fault(path)}")
        check.must(entry.version or entry.kind != "file", f"{path!r} has no version")
    files = await check.files()
    missing, surplus = sorted(check.expected.keys() - files), sorted(files.keys() - check.expected)
    rejected = [pair for pair in snapshot.rejected if pair[0] in check.expected]
    check.must(not missing, f"its snapshot lacks {missing}; rejected: {rejected}")
    check.must(not surplus, f"its snapshot shows {surplus}, which nobody expected")


async def _sizes_and_digests_are_right(check: _Check) -> None:
    """An entry's size is exact, and a digest that is published is the content's."""
    for path, entry in (await check.files()).items():
        data = check.expected[path]
        check.must(entry.size == len(data), f"{path!r} has {len(data)} bytes, its entry says {entry.size}")
        if entry.digest:
            hasher = entry.digest.hasher(len(data))
            hasher.update(data)
            found = hasher.hexdigest()
            check.must(
                found == entry.digest.value,
                f"{path!r} has {entry.digest.algorithm}:{found}, its entry says {entry.digest}",
            )


async def _the_snapshot_is_stable(check: _Check) -> None:
    """Two snapshots of an unchanged store are equal and survive the metadata cache."""
    first, second = await check.snapshot(), await check.snapshot()
    check.must(first.revision == second.revision, f"revisions differ: {first.revision}, {second.revision}")
    changed = [path for path, entry in first.entries.items() if second.entries.get(path) != entry]
    check.must(first == second, f"two snapshots of one revision differ, for example in {changed[:3]}")
    again = Snapshot.from_json(json.loads(json.dumps(first.to_json())))
    check.must(again == first, "its snapshot does not survive to_json() and from_json()")


async def _entries_agree_with_the_snapshot(check: _Check) -> None:
    """entry(path) is what the snapshot says; a path that others begin with is a directory."""
    for path, listed in (await check.files()).items():
        entry = await check.entry(path)
        for name in ("path", "kind", "size", "version"):
            one, other = getattr(entry, name), getattr(listed, name)
            check.must(one == other, f"entry({path!r}) has {name} {one!r}, the snapshot {other!r}")
    for path in check.parents():
        entry = await check.entry(path)
        check.must(entry.kind == "directory", f"entry({path!r}) is a {entry.kind}, not a directory")
        check.must(entry.path == path, f"entry({path!r}) calls itself {entry.path!r}")


async def _what_is_absent_is_not_found(check: _Check) -> None:
    """entry() of a path that is not there raises NotFound, however the path looks."""
    taken = {*check.expected, *check.parents()}
    longest = max(check.expected, key=len)
    absent = ["no-such-file", "no/such/file", f"{longest}/below", f"{longest}x", "../up", "/etc/passwd", ""]
    # The beginning of a name is a prefix of keys in an object store, but no directory.
    absent += [path[:-1] for path in (longest, *check.parents()) if not path[:-1].endswith("/")]
    for path in sorted({*absent} - taken):
        try:
            entry = await check.store.entry(path)
        except NotFound as error:
            check.must("\n" not in str(error), f"the error of entry({path!r}) has several lines")
            check.show_no_secret(f"the error of entry({path!r})", f"{error} {error!r}")
        except Exception as error:
            raise check.fault(f"entry({path!r}) raised {error!r} instead of NotFound") from error
        else:
            raise check.fault(f"entry({path!r}) is {entry} instead of NotFound")


async def _locations_lead_to_the_bytes(check: _Check) -> None:
    """Any span of any file can be read from where locate() says."""
    for path, entry in (await check.files()).items():
        data = check.expected[path]
        location = await check.locate(entry)
        check.show_no_secret(f"the repr() of locate({path!r})", repr(location))
        size, middle = len(data), len(data) // 2
        spans = {Span(0, size), Span(0, min(1, size)), Span(max(0, size - 1), size), Span(middle, size)}
        for span in sorted(spans):
            found = await check.read(path, location, span)
            check.must(found == data[span.start : span.stop], f"{span} of {path!r} has wrong bytes")


async def _verbs_can_be_called_at_once(check: _Check) -> None:
    """Concurrent calls all get the answer that a lone one gets."""
    path, entry = next(iter((await check.files()).items()))
    revision = (await check.snapshot()).revision
    answers: list[tuple[str, str, bytes] | AssertionError] = []

    async def one() -> None:
        try:
            snapshot, found = await check.snapshot(), await check.entry(path)
            answers.append((snapshot.revision, found.version, await check.whole(entry)))
        except AssertionError as error:
            answers.append(error)

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(one)
    lone = (revision, entry.version, check.expected[path])
    for answer in answers:
        if isinstance(answer, AssertionError):
            raise answer
        check.must(answer == lone, f"of calls made at once one got {answer[:2]}, a lone one {lone[:2]}")


async def _verbs_can_be_cancelled(check: _Check) -> None:
    """A verb cancelled at any moment ends, and the store works as before."""
    path, entry = next(iter((await check.files()).items()))
    before = await check.snapshot()
    verbs: dict[str, Callable[[], Awaitable[Any]]] = {
        "snapshot()": check.snapshot,
        f"entry({path!r})": lambda: check.entry(path),
        f"locate({path!r})": lambda: check.locate(entry),
    }
    for name, verb in verbs.items():
        for steps in (0, 1, 2, 5, 10):
            await _cancelled_after(steps, verb)
        after = await check.snapshot()
        check.must(after == before, f"cancelling {name} changed the snapshot")
    found = await check.whole(entry)
    check.must(found == check.expected[path], f"{path!r} has wrong bytes after calls were cancelled")


async def _cancelled_after(steps: int, verb: Callable[[], Awaitable[Any]]) -> None:
    """Run `verb` and cancel it after that many rounds of the scheduler; raise what it raised."""
    failures: list[AssertionError] = []

    async def run() -> None:
        try:
            await verb()
        except AssertionError as error:
            failures.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        for _ in range(steps):
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    if failures:
        raise failures[0]


_PROMISES = (
    _it_has_an_identity,
    _the_snapshot_is_complete,
    _sizes_and_digests_are_right,
    _the_snapshot_is_stable,
    _entries_agree_with_the_snapshot,
    _what_is_absent_is_not_found,
    _locations_lead_to_the_bytes,
    _verbs_can_be_called_at_once,
    _verbs_can_be_cancelled,
)
