"""``file:///abs/path``: a directory, or a single file, of this machine or of a network mount.

URLs follow RFC 8089: no host or ``localhost``, bytes outside ASCII percent-encoded. A path that is a
symbolic link is resolved once for each snapshot, so a ``current`` link can be switched atomically.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes, urlsplit

import trio

from modelfs.errors import AccessDenied, ConfigError, NotFound, Stale, StoreError, Unavailable
from modelfs.stores import Options, checked_options, entry_in, redact
from modelfs.types import Entry, Location, Snapshot

_THREADS = trio.CapacityLimiter(4)

Rejected = tuple[str, str]
"""A path that the directory has and the tree must not show, and why."""


def path_of(url: str) -> Path:
    """Return the absolute path that a ``file://`` URL names.

    Raises:
        ConfigError: if the URL names another host, or no absolute path.

    """
    try:
        parts = urlsplit(url)
        path = os.fsdecode(unquote_to_bytes(os.fsencode(parts.path)))
    except ValueError as error:
        raise ConfigError(f"{redact(url)}: malformed URL: {error}") from error
    if parts.netloc not in ("", "localhost"):
        raise ConfigError(f"{redact(url)}: names the host {parts.hostname!r}: write file:///absolute/path")
    if parts.query or parts.fragment:
        raise ConfigError(f"{redact(url)}: write ? as %3F and # as %23 in a file:// URL")
    if not path.startswith("/") or "\0" in path:
        raise ConfigError(f"{redact(url)}: no absolute path: write file:///absolute/path")
    return Path("/" + path.strip("/"))


def url_of(path: Path) -> str:
    """Return the ``file://`` URL of an absolute `path`; `path_of` reverses it whatever bytes are in it."""
    return f"file://{quote(os.fsencode(path))}"


def token_of(status: os.stat_result) -> str:
    """Return ``dev:inode:size:mtime_ns``, which names one state of one file."""
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"


class FileStore:
    """A directory or a single file; implements :class:`modelfs.stores.Store`, takes no options.

    Everything is listed recursively. A symbolic link to a file inside the directory appears as that file,
    one to a directory inside as a link, so that loops do no harm. Links that lead outside or nowhere,
    sockets, pipes, devices and sub-directories that cannot be listed are in ``Snapshot.rejected``.

    Listing runs in a thread; a cancelled call leaves it to end by itself.
    """

    def __init__(self, url: str, options: Options) -> None:
        checked_options(url, options, {})
        self._path = path_of(url)
        self.url = url_of(self._path)

    async def snapshot(self) -> Snapshot:
        """List the directory; its revision is derived from names, inodes, sizes and modification times.

        Raises:
            NotFound: there is no such directory or file.
            AccessDenied: it must not be listed.
            Unavailable: the file system failed.

        """
        return await trio.to_thread.run_sync(self._snapshot, abandon_on_cancel=True, limiter=_THREADS)

    async def entry(self, path: str) -> Entry:
        """Return the entry at `path` of a fresh listing; NotFound if there is none."""
        return entry_in(await self.snapshot(), path)

    async def locate(self, entry: Entry) -> Location:
        """Return the file's own URL, with the token it must still have when it is opened.

        Raises:
            Stale: the file was changed, replaced or removed since it was listed.

        """
        return await trio.to_thread.run_sync(self._locate, entry, abandon_on_cancel=True, limiter=_THREADS)

    def _snapshot(self) -> Snapshot:
        root = _real(self._path)
        entries: list[Entry] = []
        rejected: list[Rejected] = []
        try:
            single = not stat.S_ISDIR(root.stat().st_mode)
            for item in [_look(root, root, self._path.name)] if single else _walk(root):
                entries.append(item) if isinstance(item, Entry) else rejected.append(item)
        except OSError as error:
            raise self._failure(error) from error
        listed = Snapshot.of(self.url, "", entries)
        return replace(listed, rejected=(*listed.rejected, *sorted(rejected)))

    def _locate(self, entry: Entry) -> Location:
        root = _real(self._path)
        try:
            single = not stat.S_ISDIR(root.stat().st_mode)
            real = root if single else _real(root / entry.path)
            unchanged = real.is_relative_to(root) and token_of(real.stat()) == entry.version
        except (FileNotFoundError, NotADirectoryError):
            unchanged = False
        except OSError as error:
            raise self._failure(error) from error
        if not unchanged:
            raise Stale(f"{self.url}: {entry.path!r} was changed since it was listed: refresh the model")
        return Location(url_of(real), token=entry.version)

    def _failure(self, error: OSError) -> StoreError:
        if isinstance(error, PermissionError):
            return AccessDenied(f"{self.url}: {error.strerror}: let the daemon's user read it")
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            return NotFound(f"{self.url}: {error.strerror}: check the path")
        return Unavailable(f"{self.url}: {error.strerror}: check the disk or the network mount")


def _walk(root: Path) -> Iterator[Entry | Rejected]:
    """Yield everything below the directory `root`; OSError if `root` itself cannot be listed."""
    pending = [""]
    while pending:
        directory = pending.pop()
        try:
            with os.scandir(root / directory) as children:
                names = [child.name for child in children]
        except OSError as error:
            if not directory:
                raise
            yield directory, _reason(error)
            continue
        for name in names:
            path = f"{directory}/{name}" if directory else name
            found = _look(root / path, root, path)
            if isinstance(found, Entry) and found.kind == "directory":
                pending.append(path)
            yield found


def _look(file: Path, root: Path, path: str) -> Entry | Rejected:
    """Return the entry for `file`, which is to appear as `path`, or why it must not."""
    try:
        status = file.lstat()
        if stat.S_ISLNK(status.st_mode):
            real = _real(file)
            if not real.is_relative_to(root):
                return path, "the symbolic link leaves the directory"
            link, status = status, real.stat()
            if stat.S_ISDIR(status.st_mode):
                return Entry(
                    path, kind="symlink", target=os.path.relpath(real, file.parent), mtime=link.st_mtime
                )
    except OSError as error:
        return path, _reason(error)
    if stat.S_ISDIR(status.st_mode):
        return Entry(path, kind="directory", mtime=status.st_mtime)
    if stat.S_ISREG(status.st_mode):
        return Entry(path, status.st_size, token_of(status), None, status.st_mtime)
    return path, "it is neither a regular file nor a directory"


def _real(path: Path) -> Path:
    # Path.resolve raises RuntimeError for loops before Python 3.13; a loop left in place fails in stat().
    return Path(os.path.realpath(path))


def _reason(error: OSError) -> str:
    return f"it cannot be read: {error.strerror}"
