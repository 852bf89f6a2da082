"""One archive of a store: what is in it, found in one pass, and the bytes of its members.

The pass runs in a thread, reads the archive through the fetch path as any reader would, and goes no further
than somebody needs: to the name that is looked up, to the bytes that are read, to the end for a listing.
Then it waits where it is. What it has found is final: a member is shown as soon as its header was passed.

Members of a plain tar and stored ones of a zip are spans of the archive. Deflated ones of a zip are unpacked
from their beginning on. All bytes become blocks of the member's own object in the cache, by flights as those
of any other object; to the engine an `Archive` is what the range client is for other objects.

Threads: the pass adds to `contents`, which the trio thread looks into without changing it, and wakes it with
``run_sync_soon``; it asks the trio thread before each step that nobody is known to wait for.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from hashlib import sha256
from typing import Any, BinaryIO, cast

import trio

from modelfs.archives import Contents, File, Format, Limits, Member, format_of, tar, zips
from modelfs.archives.gzip import Gzip, Mark
from modelfs.archives.streams import Checkpoint, Stored, Stream
from modelfs.archives.zstd import Zstd
from modelfs.cache import Cache
from modelfs.errors import BadArchive, Corrupt, ModelfsError, Stale
from modelfs.fetch.engine import Fetcher
from modelfs.fetch.guard import Sink
from modelfs.fetch.passing import Passing
from modelfs.fetch.reader import Reader, ReaderFile
from modelfs.fetch.shelf import Shelf
from modelfs.fetch.source import Source
from modelfs.fetch.sweep import Enter, Request, Requests, Sweep
from modelfs.types import BLOCK, Digest, Entry, Hasher, Location, Span

log = logging.getLogger(__name__)

AGAIN_SECONDS = 30.0
"""How long the error of a pass is the answer to all who ask, before another pass is tried."""

HOP = 64 * 1024
"""Bytes read at once where headers are: enough for many small members, little beside large ones."""

SPACING = 4 * 1024 * 1024
"""Unpacked bytes between two checkpoints: what is unpacked for nothing when a member is read again."""

MAX_POINTS = 1024
"""About how many checkpoints an archive has at the most; each is 44 KB of metadata."""

COPY = 1024 * 1024
"""Bytes of a member copied at once."""

Codec = Callable[[File, Checkpoint | None, int, Mark | None], Stream]
"""Opens an unpacked stream; arguments are as of `Gzip`."""

SCHEME = "member"
"""Scheme of the locations of members; what follows it is the member's path in its archive."""


class Archive:
    """An archive whose members a model shows; all belongs to the trio thread but where it says otherwise.

    Args:
        fetcher: the fetch path.
        cache: where its index and the contents of its members are kept.
        source: the store that it comes from.
        entry: the archive itself.
        prefix: what is before the path of a member in the model; empty if the archive is the model.
        directory: of the archive that is the model, if not all of it is; then there is no prefix.
        limits: what it must not exceed.
        settled: called when everything in it is known, before `finish` returns.

    Attributes:
        version: the version of all its members: it names the archive's content.
        contents: what is known of it.
        done: whether that is all.
        error: what ended the pass, if it failed.

    """

    def __init__(
        self,
        fetcher: Fetcher,
        cache: Cache,
        source: Source,
        entry: Entry,
        prefix: str,
        limits: Limits,
        settled: Callable[[], Awaitable[None]],
        directory: str = "",
    ) -> None:
        self.entry = entry
        self.prefix = prefix
        self.version = f"archive-{_hash(source.key(entry), prefix, directory)}"
        self._directory = f"{directory}/" if directory else ""
        self.contents = Contents(limits)
        self.done = False
        self.error: ModelfsError | None = None
        self.source = source
        self._fetcher = fetcher
        self._cache = cache
        self._limits = limits
        self._settled = settled
        self._format = format_of(entry.path)
        self._token = trio.lowlevel.current_trio_token()
        self._shelf = Shelf(cache, self.version)
        self._kept = 0
        self._keeping = trio.Lock()
        self._running = False
        self._again_at = -math.inf
        self._scope = trio.CancelScope()
        self._asked = 0
        self._needed = trio.lowlevel.ParkingLot()
        self._changed = trio.lowlevel.ParkingLot()
        self._sweeps: dict[str, Sweep] = {}
        self._requests = Requests()
        self._points: list[Checkpoint] = []

    # -- names -----------------------------------------------------------------------------------------

    def load(self) -> None:
        """Take in what an earlier daemon found out; called once, in a thread, before anything else."""
        kept = self._shelf.load()
        if kept is not None:
            self.contents.restore(iter(kept.members))
            self.contents.rejected = kept.rejected
            self._points = kept.points
            self.done = kept.done
            self._kept = len(kept.members)

    async def find(self, path: str) -> Entry | None:
        """Return the entry at `path` of the model once it is known whether there is one; None if not.

        Raises:
            ModelfsError: it cannot be found out.

        """
        inside = self._inside(path)
        while not self.done:
            contents = self.contents
            if not contents.holds(inside):
                await self._advance()
                continue
            await self._keep()  # a successor must know what the kernel has seen
            if contents is self.contents:  # else the archive was found to be wrong meanwhile
                break
        if not self.contents.holds(inside):
            return None
        member = self.contents.members.get(inside)
        return member.entry(self.prefix, self.version) if member else Entry(path, kind="directory")

    async def finish(self) -> None:
        """Return when everything in it is known.

        Raises:
            ModelfsError: it cannot be found out.

        """
        while not self.done or self._running:  # until it is shown as well
            await self._advance()

    def stop(self) -> None:
        """End the pass: nobody is going to ask again."""
        self._scope.cancel()

    async def _advance(self) -> None:
        """Let the pass go on until there is news of it; raise what ended it."""
        self._begin()
        self._asked += 1
        self._needed.unpark_all()
        try:
            await self._changed.park()
        finally:
            self._asked -= 1
        if self.error is not None:
            raise self.error

    def _begin(self) -> None:
        """See to it that the pass is under way; raise what ended it if that was just now."""
        if not self._running:
            if self.error is not None and trio.current_time() < self._again_at:
                raise self.error
            self.error, self._running = None, True
            self._requests = Requests()
            self._fetcher.nursery.start_soon(self._pass)

    async def _keep(self) -> None:
        """Put what was found since the last time on disk."""
        async with self._keeping:
            members = list(self.contents.members.values())
            fresh, self._kept = members[self._kept :], max(self._kept, len(members))
            if fresh:
                await trio.to_thread.run_sync(self._shelf.append, fresh, limiter=self._fetcher.disk)

    # -- the pass --------------------------------------------------------------------------------------

    async def _pass(self) -> None:
        with self._scope:
            await self._pass_through()
        self._running = False
        gone = f"{self.source.url}: {self.entry.path}: there is another version now"
        self._requests.end(self.error or (None if self.done else Stale(gone)))
        self._changed.unpark_all()

    async def _pass_through(self) -> None:
        try:
            async with self._opened() as file:
                await trio.to_thread.run_sync(self._unpack, file, limiter=_PASSES)
            async with self._keeping:
                members = list(self.contents.members.values())
                finish = partial(self._shelf.finish, members, self.contents.rejected, self._points)
                await trio.to_thread.run_sync(finish, limiter=self._fetcher.disk)
                self._kept = len(members)  # who waits in `_keep` must not say again that more is to come
            self.done = True
            await self._settled()
        except ModelfsError as error:
            await self._fail(error)
        except Exception as error:  # whatever is in an archive, it must not end the daemon
            log.exception("%s: %s", self.source.url, self.entry.path)
            await self._fail(BadArchive(f"it cannot be read: {type(error).__name__}"))

    async def _fail(self, error: ModelfsError) -> None:
        place = f"{self.source.url}: {self.entry.path}"
        if isinstance(error, BadArchive):
            error = BadArchive(f"{place}: the archive is not shown: {error}")
        log.warning("%s", error)
        self.error = error
        if not error.retryable:
            pause = math.inf if isinstance(error, BadArchive) else AGAIN_SECONDS
            self._again_at = trio.current_time() + pause
        if isinstance(error, BadArchive | Corrupt):
            wrong, self.contents = self.contents, Contents(self._limits)
            async with self._keeping:
                self._kept = 0
                await trio.to_thread.run_sync(self._discard, wrong, limiter=self._fetcher.disk)

    def _discard(self, wrong: Contents) -> None:
        """Forget everything that came from it."""
        self._shelf.clear(self._points)
        for member in wrong.members.values():
            if member.kind == "file":
                entry = member.entry(self.prefix, self.version)
                shown = replace(entry, path=entry.path.removeprefix(self._directory))
                self._cache.discard(self.source.key(shown))

    def _unpack(self, file: BinaryIO) -> None:
        """Find all members; in the thread of the pass."""
        self.contents.restart()
        match self._format:
            case "zip":
                # Its directory is read whole, and little: nothing is gained by waiting in the middle.
                for member in zips.members(_buffered(file), self.entry.size, self._limits):
                    self._found(zips.linked(file, member) if member.kind == "symlink" else member)
            case "tar.gz" | "tar.zst":
                self._pass_over(cast(_Packed, file))
            case _:
                for member in tar.members(_buffered(file), self._limits):
                    if member.offset + member.size > self.entry.size:
                        raise BadArchive("it is truncated in the content of its last member")
                    self._found(member)
                    self._wait()

    def _pass_over(self, file: _Packed) -> None:
        """Find the members of a packed tar; it is unpacked to its end, since its checksum is there."""
        hasher = self.entry.digest.hasher(self.entry.size) if self.entry.digest else None
        file.hasher = hasher
        self._points = []
        spacing = max(SPACING, self.entry.size // MAX_POINTS)
        stream = _CODECS[self._format](file, None, spacing, self._mark)
        passing = Passing(stream, self._requests, self._limits, self._wait, self.contents.note)
        for member in tar.members(passing, self._limits):
            shown = self._found(member)
            passing.expect(shown if shown and shown.kind == "file" and member.kind == "file" else None)
            self._wait()
        passing.drain()
        if hasher and self.entry.digest and hasher.hexdigest() != self.entry.digest.value:
            raise Corrupt(
                f"{self.source.url}: {self.entry.path}: the bytes do not have the published digest "
                f"{self.entry.digest}; everything that came from them was discarded"
            )

    def _mark(self, point: Checkpoint) -> None:
        self._shelf.mark(point)
        self._points.append(point._replace(window=b""))

    def _found(self, member: Member) -> Member | None:
        shown = self.contents.add(member)
        self._token.run_sync_soon(self._changed.unpark_all, idempotent=True)
        return shown

    def _wait(self) -> None:
        """Return when somebody needs what the pass comes to next; in its thread."""
        if not self._asked and not self._requests.pending():
            trio.from_thread.run(self._until_needed)

    async def _until_needed(self) -> None:
        while not self._asked and not self._requests.pending():
            await self._needed.park()

    # -- contents --------------------------------------------------------------------------------------

    async def locate(self, entry: Entry) -> Location:
        """Return the location of a member, good for `fetch` only.

        Raises:
            Stale: there is no such member.
            ModelfsError: that cannot be found out.

        """
        if await self.find(entry.path) is None:
            raise Stale(f"{self.source.url}: {self.entry.path} has no member {entry.path!r} (any more)")
        path = self._inside(entry.path)
        digest = self.contents.members[path].digest
        return Location(f"{SCHEME}:{path}", digest=Digest.parse(digest) if digest else None)

    async def fetch(
        self, location: Location, span: Span, size: int, sink: Sink, *, ranged: bool = True
    ) -> None:
        """Bring `span` of the member at `location` into `sink`, as `RangeClient.fetch` does.

        Raises:
            BadArchive: it is damaged.
            ModelfsError: the bytes of the archive cannot be had.
            Exception: what the sink raised.

        """
        member = self.contents.members.get(location.url.removeprefix(f"{SCHEME}:"))
        if member is None or member.size != size:
            raise Stale(f"{self.source.url}: {self.entry.path} was found to be another archive")
        try:
            if self._format in _CODECS:
                await self._fetch_unpacked(member, span, sink)
            elif self._format == "zip" and member.method == zips.DEFLATED and size > BLOCK:
                await self._sweep(member.path, partial(_enter_deflated, member)).fetch(0, span, sink)
            else:
                async with self._opened() as file:
                    copy = partial(self._copy, file, member, span, sink)
                    await trio.to_thread.run_sync(copy, limiter=_COPIES)
        except BadArchive as error:
            raise BadArchive(f"{self.source.url}: {self.entry.path}: {member.path}: {error}") from error

    async def _fetch_unpacked(self, member: Member, span: Span, sink: Sink) -> None:
        """Take the bytes out of the pass if it has not come to them, else out of a sweep of their own."""
        if not self.done:
            self._begin()
            request = Request(member.offset, span, sink)
            if self._requests.add_ahead(request):
                self._needed.unpark_all()
                if await self._requests.wait(request):
                    return
                raise BadArchive("its content ends early")
        await self._sweep("", self._enter).fetch(member.offset, span, sink)

    def _enter(self, file: BinaryIO, wanted: int, position: int | None) -> Stream | None:
        """Return the stream from the last checkpoint before `wanted` on; see `sweep.Enter`."""
        codec = _CODECS[self._format]
        for point in reversed([point for point in self._points if point.unpacked <= wanted]):
            if position is not None and point.unpacked <= position <= wanted:
                return None
            marked = self._shelf.marked(point)
            if marked is not None:
                return codec(file, marked, 0, None)
        return None if position is not None and position <= wanted else codec(file, None, 0, None)

    def _copy(self, file: BinaryIO, member: Member, span: Span, sink: Sink) -> None:
        """Copy what can be entered anywhere, or is small."""
        stream: Stream
        if self._format == "tar":
            stream = Stored(file, member.offset, member.size, span.start)
        else:
            stream = zips.content(file, member, span.start)
        while stream.position < span.start:
            if not stream.read(min(COPY, span.start - stream.position)):
                raise BadArchive("its content ends early")
        sink.begin(span)
        while (offset := stream.position) < span.stop:
            data = stream.read(min(COPY, span.stop - offset))
            if not data:
                raise BadArchive("its content ends early")
            sink.write(offset, data)

    def _sweep(self, name: str, enter: Enter) -> Sweep:
        self._sweeps = {known: sweep for known, sweep in self._sweeps.items() if sweep.running}
        if name not in self._sweeps:
            self._sweeps[name] = Sweep(self._fetcher.nursery, _COPIES, self._opened, enter)
        return self._sweeps[name]

    def _inside(self, path: str) -> str:
        return path[len(self.prefix) + 1 :] if self.prefix else self._directory + path

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[BinaryIO]:
        """Open the archive itself for a thread."""
        reader = await self._fetcher.open(self.source, self.entry)
        try:
            yield cast(BinaryIO, _Packed(reader, self.entry.size))
        finally:
            reader.close()


class _Packed(ReaderFile):
    """The bytes of an archive; those that are read in order pass through `hasher`."""

    def __init__(self, reader: Reader, size: int) -> None:
        super().__init__(reader, size)
        self.hasher: Hasher | None = None
        self._hashed = 0

    def readinto(self, buffer: Any) -> int:
        start = self.tell()
        count = super().readinto(buffer)
        if self.hasher and start == self._hashed:
            self.hasher.update(memoryview(buffer)[:count])
            self._hashed += count
        return count


def _hash(*parts: str) -> str:
    return sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _buffered(file: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, file), HOP))


def _enter_deflated(member: Member, file: BinaryIO, wanted: int, position: int | None) -> Stream | None:
    return None if position is not None and position <= wanted else zips.content(file, member, 0)


_CODECS: Mapping[Format | None, Codec] = {"tar.gz": Gzip, "tar.zst": Zstd}

_PASSES = trio.CapacityLimiter(math.inf)
"""A pass that nobody needs at the moment keeps its thread."""

_COPIES = trio.CapacityLimiter(32)
