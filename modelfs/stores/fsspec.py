"""``fsspec+PROTOCOL://…``: whatever fsspec has a file system for, for example ``fsspec+sftp://HOST/PATH``.

The file system lists, and it reads as well: its bytes come through no URL that the range client could fetch.
Before and after each read the file must be of the pinned version, so that no byte of another gets through.
API: https://filesystem-spec.readthedocs.io/en/latest/api.html.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, TypeVar

import trio

from modelfs.errors import AccessDenied, BadAnswer, ConfigError, NotFound, Stale, StoreError, Unavailable
from modelfs.stores import Options, checked_options, entry_in, redact, require
from modelfs.types import Entry, Location, Snapshot, Span, path_fault

T = TypeVar("T")
Info = Mapping[str, Any]
"""What a file system says about one file: ``name``, ``type``, ``size`` and what else it likes."""
Rejected = tuple[str, str]
"""A path that is there and that the tree must not show, and why."""

MAX_ENTRIES = 100_000
MAX_DEPTH = 32
CONNECTIONS = 4
"""File systems of one store in use at once; SSH servers refuse more than ten logins at a time."""

_THREADS = trio.CapacityLimiter(8)
_TIMES = (
    "mtime", "LastModified", "last_modified", "modified", "modify", "updated", "modificationTime",
    "modifiedTime", "last_write_time", "date_time", "created",
)  # fmt: skip
_VERSIONS = (
    "etag", "ETag", "e_tag", "version_id", "generation", "sha256", "sha", "md5", "md5Hash", "content_md5",
    "checksum", "CRC", *_TIMES,
)  # fmt: skip
"""Facts that tell two contents of a file apart, best first, by the names that file systems give them."""
_OURS = {"sftp": "modelfs.stores.sftp:Sftp", "ssh": "modelfs.stores.sftp:Sftp"}
"""File systems that we make ourselves."""
_SECRET = re.compile("pass|secret|token|key|credential|auth", re.IGNORECASE)
_RESERVED = {"asynchronous", "loop", "skip_instance_cache", "use_listings_cache", "fs", "mode"}


class FsspecStore:
    """A directory or a file of an fsspec file system; implements :class:`modelfs.stores.Store`.

    Options are those of the file system, each text, a number or a truth value; besides, ``max_entries``
    (100,000) limits what is listed. Passwords and the like may be among them, in the URL, or in fsspec's own
    configuration; they are never shown.

    Every directory is listed. Symbolic links, and files about which nothing is told that changes with their
    content, are in ``Snapshot.rejected``.

    Raises:
        ConfigError: malformed URL or option, or the library of the protocol is not installed.

    """

    def __init__(self, url: str, options: Options) -> None:
        require("fsspec", "fsspec")
        found = re.fullmatch(r"fsspec\+([a-z][a-z0-9_.-]*)://(.*)", url, re.DOTALL | re.IGNORECASE)
        if found is None or "::" in url:
            raise ConfigError(f"{redact(url)!r} is not a URL for fsspec: write fsspec+PROTOCOL://PATH")
        protocol, address = found[1].lower(), f"{found[1].lower()}://{found[2]}"
        self.url = f"fsspec+{redact(address)}"
        self._max_entries: int = options.get("max_entries", MAX_ENTRIES)
        arguments = _checked(self.url, options)
        make = _file_system(self.url, protocol)
        try:
            arguments = {**make._get_kwargs_from_urls(address), **arguments}
            path: str = make._strip_protocol(address)
        except ValueError as error:
            raise ConfigError(f"{self.url}: malformed URL: write fsspec+{protocol}://PATH") from error
        self._root, self._top = path.rstrip("/"), path.rstrip("/") or path
        self.identity = _identity(self.url, arguments)
        self._systems = _Systems(lambda: make(skip_instance_cache=True, **arguments))

    def __repr__(self) -> str:
        return f"<FsspecStore {self.url}>"

    async def snapshot(self) -> Snapshot:
        """List everything; the revision is derived from the listing.

        Raises:
            NotFound: nothing is there.
            StoreError: there is too much, or the file system failed.

        """
        return await self._in_thread(self._snapshot)

    async def entry(self, path: str) -> Entry:
        """Return the entry at `path` of a fresh listing; NotFound if there is none."""
        return entry_in(await self.snapshot(), path)

    async def locate(self, entry: Entry) -> Location:
        """Return a location that is read through the file system.

        Nothing is asked of it: that the version is gone is noticed by who reads.
        """
        where = f"{self.url.rstrip('/')}/{entry.path}"
        return Location(where, reader=lambda span: self._read(entry, span))

    def _snapshot(self) -> Snapshot:
        entries: list[Entry] = []
        rejected: list[Rejected] = []
        with self._system() as system:
            for found in self._walk(system):
                entries.append(found) if isinstance(found, Entry) else rejected.append(found)
                if len(entries) + len(rejected) > self._max_entries:
                    raise StoreError(
                        f"{self.url}: more than {self._max_entries} entries: raise the option max_entries"
                    )
        listed = Snapshot.of(self.url, "", entries)
        return replace(listed, rejected=(*listed.rejected, *sorted(rejected)))

    def _walk(self, system: Any) -> Iterator[Entry | Rejected]:
        info = system.info(self._top)
        if info["type"] != "directory":
            yield _look(info, self._root.rpartition("/")[2])
            return
        pending = [""]
        while pending:
            directory = pending.pop()
            for info in system.ls(self._name(directory), detail=True):
                path = self._path(info["name"])
                if path == directory:  # some list it in itself
                    continue
                found = _look(info, path)
                if path.rpartition("/")[0] != directory:
                    found = path, "it is not where it was listed"
                elif isinstance(found, Entry) and found.kind == "directory":
                    if path.count("/") < MAX_DEPTH:
                        pending.append(path)
                    else:
                        found = path, f"it is deeper than {MAX_DEPTH} directories"
                yield found

    def _name(self, path: str) -> str:
        """Return what the file system calls the `path` below the root."""
        return f"{self._root}/{path}" if path else self._top

    def _path(self, name: str) -> str:
        """Return the path of what the file system calls `name`; ValueError if it is not below the root."""
        root, name = self._root.strip("/"), name.strip("/")
        if root and name != root and not name.startswith(f"{root}/"):
            raise ValueError("a name outside of what was listed")
        return name.removeprefix(root).strip("/")

    def _read(self, entry: Entry, span: Span) -> bytes:
        """Return the bytes of `entry` in `span`.

        Raises:
            Stale: they are of another version now.
            StoreError: the file system failed.

        """
        name = self._name(entry.path)
        if entry.path == self._root.rpartition("/")[2]:  # perhaps the root is a file
            with self._system() as system:
                name = name if system.info(self._top)["type"] == "directory" else self._top
        self._check(entry, name)
        with self._system() as system:
            data: bytes = system.cat_file(name, start=span.start, end=span.stop)
        self._check(entry, name)
        return data

    def _check(self, entry: Entry, name: str) -> None:
        with self._system() as system:
            found = _look(system.info(name), entry.path, entry.version.partition("=")[0])
        if found != replace(entry, mtime=getattr(found, "mtime", 0.0)):
            raise Stale(f"{self.url}: {entry.path!r} was changed since it was listed: refresh the model")

    @contextmanager
    def _system(self) -> Iterator[Any]:
        """Lend a file system, and raise what it raises as the StoreError that it means."""
        try:
            with self._systems.one() as system:
                yield system
        except StoreError:
            raise
        except Exception as error:
            raise _fault(error, self.url) from error

    async def _in_thread(self, verb: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(verb, abandon_on_cancel=True, limiter=_THREADS)


class _Systems:
    """File systems of one kind, each used by one thread at a time: few of them are safe for several.

    One that failed is not used again, nor one that fsspec itself would not: it holds what it once read.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._idle: list[Any] = []
        self._free = threading.BoundedSemaphore(CONNECTIONS)

    @contextmanager
    def one(self) -> Iterator[Any]:
        with self._free:
            try:
                system = self._idle.pop()
            except IndexError:
                system = self._make()
            fit = False  # whatever else is raised may have broken it
            try:
                yield system
                fit = system.cachable
            except (FileNotFoundError, StoreError):
                fit = system.cachable
                raise
            finally:
                if fit:
                    self._idle.append(system)


def _file_system(url: str, protocol: str) -> Any:
    """Return the class for `protocol`.

    Raises:
        ConfigError: fsspec does not know it, or its library is not installed.

    """
    import fsspec

    try:
        if protocol in _OURS:
            module, _, name = _OURS[protocol].partition(":")
            return getattr(importlib.import_module(module), name)
        return fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise ConfigError(f"{url}: {error}: install what fsspec needs for {protocol}") from error
    except ValueError as error:
        raise ConfigError(f"{url}: fsspec knows no protocol {protocol!r}") from error


def _checked(url: str, options: Options) -> dict[str, Any]:
    """Return the arguments for the file system.

    Raises:
        ConfigError: naming the option that cannot be one.

    """
    for name, value in options.items():
        if name in _RESERVED or not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(f"{url}: option {name[:40]!r} is not for the configuration")
        if not isinstance(value, str | int | float):
            raise ConfigError(f"{url}: option {name!r} must be text, a number, true or false")
    own = {name: value for name, value in options.items() if name == "max_entries"}
    checked_options(url, own, {"max_entries": int})
    return {name: value for name, value in options.items() if name not in own}


def _identity(url: str, arguments: Mapping[str, Any]) -> str:
    """Return the URL with what else decides about the place: every argument that is no secret."""
    told = sorted((name, str(value)) for name, value in arguments.items() if not _SECRET.search(name))
    return f"{url} with {hashlib.sha256(repr(told).encode()).hexdigest()[:12]}" if told else url


def _look(info: Info, path: str, by: str = "") -> Entry | Rejected:
    """Return the entry of a file or directory that is to appear as `path`, or why it must not.

    Args:
        info: what the file system says.
        path: below the root.
        by: the fact that is to be its version; "" for the best one.

    """
    if fault := path_fault(path):
        return path, fault
    if info.get("islink") or info["type"] == "link":
        return path, "symbolic links are not followed"
    if info["type"] == "directory":
        return Entry(path, kind="directory")
    if info["type"] != "file":
        return path, "it is neither a regular file nor a directory"
    names = (by,) if by else _VERSIONS
    name = next((name for name in names if info.get(name) not in (None, "")), None)
    if name is None:
        return path, "nothing is told about it that changes with its content"
    if info["size"] is None:
        return path, "its size is not told"
    size = int(info["size"])
    value = info[name]
    version = f"{name}={_since_epoch(value) if isinstance(value, datetime) else value}"
    if len(version) > 200 or not version.isprintable():
        version = f"{name}={hashlib.sha256(version.encode()).hexdigest()}"
    return Entry(path, size, version, mtime=_mtime(info))


def _mtime(info: Info) -> float:
    """Return when the file was changed, in seconds since the epoch; 0 if that is not told as a time."""
    for name in _TIMES:
        match info.get(name):
            case datetime() as moment:
                return _since_epoch(moment)
            case int() | float() as seconds:
                return float(seconds)
            case _:
                continue
    return 0.0


def _since_epoch(moment: datetime) -> float:
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _fault(error: Exception, url: str) -> StoreError:
    """Return what `error` of a file system means; its own text, which may hold secrets, is never used."""
    kind = type(error).__name__
    match error:
        case FileNotFoundError() | NotADirectoryError():
            return NotFound(f"{url}: nothing is there: check the path")
        case PermissionError():
            return AccessDenied(f"{url}: not permitted: check the credentials and the rights")
        case OSError() | EOFError():
            return Unavailable(f"{url}: the file system failed ({kind}): check the network")
        case LookupError() | TypeError() | ValueError() | AttributeError():
            return BadAnswer(f"{url}: the file system cannot be used ({kind}): check the URL and the options")
    if re.search("auth|credential|forbidden|key", kind, re.IGNORECASE):
        return AccessDenied(f"{url}: not let in ({kind}): check the credentials")
    return Unavailable(f"{url}: the file system failed ({kind}): check the network")
