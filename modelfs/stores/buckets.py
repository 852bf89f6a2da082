"""What the stores of objects in buckets have in common: names below a prefix, whatever cloud they are in.

A cloud is a `Bucket`: three questions, asked of its own library in a thread. `BucketStore` makes a store of
it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Protocol, TypeVar

import trio

from modelfs.errors import AccessDenied, BadAnswer, ConfigError, NotFound
from modelfs.stores import Options, redact
from modelfs.types import Entry, Location, Snapshot, path_fault

T = TypeVar("T")

THREADS = 16
"""Most threads that ask at the same time: as many connections a library needs."""

_LIMITER = trio.CapacityLimiter(THREADS)

MAX_ENTRIES = 100_000
"""Objects of one model that are listed unless the option ``max_entries`` says otherwise."""


_EMPTY_PAGES = 100
"""Pages of a listing that may hold nothing: clouds send some where much was deleted."""

_NO_TEXT = re.compile("[\ud800-\udfff]")
"""What stands for bytes that are not UTF-8; keys are."""


class Unservable(Exception):
    """An object that is there but cannot be read correctly; the text is the reason, without its name."""


class Bucket(Protocol):
    """One bucket of a cloud, whose keys are the paths of entries.

    The methods block, may be called by several threads at once and raise StoreErrors only, besides what
    makes no sense in an answer: ArithmeticError, AttributeError, LookupError, RecursionError, TypeError and
    ValueError.
    """

    def entries(self, prefix: str, most: int) -> Iterable[tuple[str, Entry | Unservable]]:
        """Yield key and entry of at most `most` objects whose keys begin with `prefix`."""

    def entry(self, key: str) -> Entry | None:
        """Return the object at `key` as it is now; None if there is none.

        Raises:
            Unservable: it cannot be read correctly.

        """

    def locate(self, key: str, entry: Entry) -> Location:
        """Return where the bytes of the object at `key` can be had, in the version that `entry` is pinned to.

        Whether the bucket still has it may be left to those who read.

        Raises:
            Stale: the bucket no longer has it.

        """


def items(pages: Iterable[Iterable[T]], most: int) -> Iterator[T]:
    """Yield at most `most` items of the `pages` of a listing.

    Raises:
        ValueError: it does not end.

    """
    left = most
    for number, page in enumerate(pages):
        if number > most + _EMPTY_PAGES:
            raise ValueError("the listing does not end")
        for item in page:
            yield item
            left -= 1
            if not left:
                return


class BucketStore:
    """A bucket, what lies under a prefix of it, or one object; implements :class:`modelfs.stores.Store`.

    ``…/pre`` is the directory ``pre/`` (never ``prefix-other/``); if nothing is in it, the object ``pre``.
    Keys that end with a slash are directories.

    Args:
        url: canonical, of the store.
        bucket: that it is in.
        path: what of the bucket: a prefix, or the key of an object.
        options: those of the store; ``max_entries`` is used here.

    Raises:
        ConfigError: `path` cannot be shown.

    """

    def __init__(self, url: str, bucket: Bucket, path: str, options: Options) -> None:
        if path and (fault := path_fault(path.removesuffix("/"))):
            raise ConfigError(f"{redact(url)!r} is no place for a model: {fault}")
        self.url = url
        self._bucket = bucket
        self._prefix = f"{path.removesuffix('/')}/" if path else ""
        self._object = "" if path.endswith("/") else path
        self._most: int = options.get("max_entries", MAX_ENTRIES)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url}>"

    async def snapshot(self) -> Snapshot:
        """List everything; not complete if there is more than ``max_entries``.

        Raises:
            NotFound: no such bucket, or nothing of that name in it.
            StoreError: any other failure.

        """
        return await self._in_thread(self._snapshot)

    async def entry(self, path: str) -> Entry:
        """Return the object at `path` as it is now, or a directory if it is the prefix of others.

        Raises:
            NotFound: nothing is there.
            StoreError: any other failure.

        """
        return await self._in_thread(lambda: self._entry(path))

    async def locate(self, entry: Entry) -> Location:
        """Return where the bytes of the version that `entry` is pinned to can be had.

        That it is gone may be noticed only by who reads there.

        Raises:
            Stale: the bucket no longer has it.
            StoreError: the store cannot be asked, or credentials cannot be had.

        """
        return await self._in_thread(lambda: self._locate(entry))

    def _snapshot(self) -> Snapshot:
        entries: list[Entry] = []
        rejected: list[tuple[str, str]] = []
        is_directory = not self._prefix
        try:
            for count, (key, found) in enumerate(self._bucket.entries(self._prefix, self._most + 1), 1):
                if count > self._most:
                    return Snapshot.of(self.url, "not listed", [], complete=False)
                is_directory = True
                path = key.removeprefix(self._prefix)
                if isinstance(found, Unservable):
                    rejected.append((path, str(found)))
                elif path:  # not the directory itself
                    entries.append(_entry(path, found))
        except AccessDenied:
            # The right to read one object does not include listing the bucket.
            if not self._object or is_directory:
                raise
        if not is_directory:
            lone = self._lone()
            if lone is None:
                raise NotFound(f"{self.url}: there is nothing under this name: check the bucket's listing")
            entries = [lone]
        listed = Snapshot.of(self.url, "", entries)
        return replace(listed, rejected=(*listed.rejected, *sorted(rejected)))

    def _entry(self, path: str) -> Entry:
        if not path_fault(path) and not _NO_TEXT.search(path):
            key = self._prefix + path
            if found := self._bucket.entry(key):
                return _entry(path, found)
            if self._any(f"{key}/"):
                return Entry(path, kind="directory")
            if self._is_lone(path) and not self._any(self._prefix) and (lone := self._lone()):
                return lone
        raise NotFound(f"{self.url} has no {path!r}")

    def _locate(self, entry: Entry) -> Location:
        if self._is_lone(entry.path):  # or an object in the directory that has its very name
            lone = self._lone()
            if (lone is not None and lone.version == entry.version) or not self._any(self._prefix):
                return self._bucket.locate(self._object, entry)
        return self._bucket.locate(self._prefix + entry.path, entry)

    def _any(self, prefix: str) -> bool:
        return any(True for _ in self._bucket.entries(prefix, 1))

    def _is_lone(self, path: str) -> bool:
        return bool(self._object) and path == self._object.rpartition("/")[2]

    def _lone(self) -> Entry | None:
        found = self._bucket.entry(self._object) if self._object else None
        return found and _entry(self._object.rpartition("/")[2], found)

    async def _in_thread(self, verb: Callable[[], T]) -> T:
        def ask() -> T:
            try:
                return verb()
            except Unservable as error:
                raise AccessDenied(f"{self.url}: cannot be read: {error}") from error
            except (
                ArithmeticError,
                AttributeError,
                LookupError,
                RecursionError,
                TypeError,
                ValueError,
            ) as error:
                # The library hands on what it could parse, whether or not it makes sense.
                raise BadAnswer(f"{self.url}: the answer makes no sense: check the endpoint") from error

        # Nothing is changed by the question, so its thread may be left behind by a cancelled caller.
        return await trio.to_thread.run_sync(ask, abandon_on_cancel=True, limiter=_LIMITER)


def _entry(path: str, found: Entry) -> Entry:
    """Return the entry of an object as the one at `path`; one whose key ends with a slash is a directory."""
    if path.endswith("/") or found.kind == "directory":
        return Entry(path.removesuffix("/"), kind="directory")
    return replace(found, path=path)
