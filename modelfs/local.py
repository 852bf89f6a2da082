"""The tree of a mount without a mount: for machines where FUSE is impossible, and for libraries.

One thread of this process runs trio; all that use one cache directory here share a cache and a fetch path.
Only one process can hold a cache at a time: who comes later waits, unless a daemon has it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import trio

from modelfs import control
from modelfs.assembly import cache_of, catalog_of, fetcher_of
from modelfs.cache import Cache, Loan
from modelfs.catalog import Catalog
from modelfs.config import Settings
from modelfs.errors import CacheError, CacheLocked, ConfigError, NotFound, Unavailable, unwrapped
from modelfs.fetch.client import RangeClient
from modelfs.fetch.engine import Fetcher
from modelfs.fetch.reader import Reader
from modelfs.metrics import Metrics
from modelfs.model import Model
from modelfs.tree import Directory, File, Link, Node, Text, Tree
from modelfs.types import BLOCK

log = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE = 600.0
"""Seconds for which another process that holds the cache is waited for: it may be fetching a large model."""

LOOK_AGAIN = 0.1
"""Seconds between two looks whether it still does."""

AT_ONCE = 8
"""Most files that are brought to a directory at the same time."""

KEPT = 2
"""Directories kept of a model: of its present snapshot, and of the one before it, which may be in use."""

FOLDER = "local"
"""Directory in that of the cache where models are materialised."""

UNLINKABLE = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOENT})
"""Errors of hard links that a copy avoids: another file system, one without, too many, no name to link to."""

MAX_LINKS = 40
"""Symbolic links followed on the way to a file, as Linux does (path_resolution(7))."""


class Loop:
    """The one trio thread of this process, begun at first use: stores share limiters, made for one run."""

    def __init__(self) -> None:
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._pid = 0
        self.token: trio.lowlevel.TrioToken
        self.nursery: trio.Nursery
        self.opening: trio.Lock
        self._stop: trio.Event

    def call(self, function: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """Return what the coroutine function returns there; raise what it raises.

        Raises:
            RuntimeError: called from that thread.

        """
        with self._starting:
            if not self._runs():
                self._start()
        return trio.from_thread.run(function, *arguments, trio_token=self.token)

    def stop(self) -> None:
        """End the thread after what runs in it has given its caches back."""
        if self._runs() and self._thread is not None:
            self.token.run_sync_soon(self._stop.set)
            self._thread.join()

    def _runs(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and self._pid == os.getpid()

    def _start(self) -> None:
        begun = threading.Event()

        async def main() -> None:
            self.token, self._stop = trio.lowlevel.current_trio_token(), trio.Event()
            self.opening = trio.Lock()
            async with trio.open_nursery() as self.nursery:
                begun.set()
                await self._stop.wait()
                self.nursery.cancel_scope.cancel()

        _engines.clear()  # of a process that this one was forked from
        self._pid = os.getpid()
        self._thread = threading.Thread(target=trio.run, args=(main,), name="modelfs", daemon=True)
        self._thread.start()
        begun.wait()


LOOP = Loop()
# atexit would be too late: executors, one of which the cache needs to close, end before.
threading._register_atexit(LOOP.stop)  # type: ignore[attr-defined]


class Engine:
    """A cache and the fetch path over it, held while anybody of this process uses them; for the loop only."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.metrics = Metrics()
        self.users = 0
        self.left = trio.Event()
        self.gone = trio.Event()
        self.filling = trio.Lock()
        self.cache: Cache
        self.fetcher: Fetcher

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        """Hold the cache until `left`; CacheError before it is started if that is impossible."""
        settings, metrics = self._settings, self.metrics
        self.cache = await cache_of(settings, metrics)
        client = RangeClient(metrics=metrics, connections=settings.connections)
        try:
            async with trio.open_nursery() as nursery:
                self.fetcher = fetcher_of(settings, nursery, self.cache, client, metrics)
                task_status.started()
                await self.left.wait()
                nursery.cancel_scope.cancel()
        finally:
            try:
                client.close()
                self.cache.close(sync=False)  # not in a thread: when a process ends there are no new ones
            finally:
                self.gone.set()


_engines: dict[Path, Engine] = {}


@contextlib.asynccontextmanager
async def _engine(settings: Settings) -> AsyncIterator[Engine]:
    """Give the engine of the cache directory of `settings`; wait for another process that holds it.

    Raises:
        CacheLocked: a daemon has it, or whoever has it does not give it back.

    """
    directory = settings.cache.directory
    async with LOOP.opening:
        engine = _engines.get(directory) or await _begun(settings)
        _engines[directory] = engine
        engine.users += 1
    try:
        yield engine
    finally:
        engine.users -= 1
        if not engine.users:
            del _engines[directory]
            engine.left.set()
            with trio.CancelScope(shield=True):
                await engine.gone.wait()


async def _begun(settings: Settings) -> Engine:
    deadline = trio.current_time() + PATIENCE
    while True:
        engine = Engine(settings)
        try:
            await LOOP.nursery.start(engine.run)
            return engine
        except CacheLocked as error:
            for record in control.mounts():
                if record.pid == error.pid:
                    raise CacheLocked(
                        f"{settings.cache.directory} is the cache of the mount on {record.mountpoint}: "
                        "add the model there, or name another cache.dir"
                    ) from error
            if trio.current_time() > deadline:
                raise
            log.info("waiting: %s", error)
        await trio.sleep(LOOK_AGAIN)


class Local:
    """The models of `settings` as a mount would show them; made by `opened`.

    Its methods block. They may be called from any thread but the loop's.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._tree = Tree()
        self._catalog: Catalog
        self._filling: trio.Lock
        self._left: trio.Event
        self._gone: trio.Event

    async def begin(self) -> None:
        """Return when every model is ready, or may be missing; in the loop.

        Raises:
            CacheError: the cache cannot be had.
            StoreError: a model that may not be missing cannot be resolved.

        """
        self._left, self._gone = trio.Event(), trio.Event()
        await LOOP.nursery.start(self._run)

    async def end(self) -> None:
        """Return when the cache was given back; in the loop."""
        self._left.set()
        await self._gone.wait()

    async def _run(self, task_status: trio.TaskStatus[None]) -> None:
        settings = self._settings
        try:
            async with _engine(settings) as engine, trio.open_nursery() as nursery:
                self._filling = engine.filling
                self._catalog = catalog_of(
                    settings, self._tree, engine.cache, engine.fetcher, engine.metrics, lambda changes: None
                )
                await self._catalog.start(nursery, keep_going=settings.keep_going)
                task_status.started()
                await self._left.wait()
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise unwrapped(group) from None
        finally:
            self._gone.set()

    # What the tree holds

    def find(self, path: str) -> Node:
        """Return what is at `path`, relative to the root of the tree, following symbolic links.

        Raises:
            NotFound: nothing is there.
            StoreError: the store failed to say so.

        """
        return LOOP.call(self._find, path)

    async def _find(self, path: str) -> Node:
        trail: list[Directory] = [self._tree.root]
        names = path.split("/")[::-1]
        links = 0
        while names:
            name = names.pop()
            if name in ("", "."):
                continue
            if name == "..":
                trail[1:] = trail[1:-1]
                continue
            node = trail[-1].children.get(name) or await self._catalog.find(trail[-1], name)
            if isinstance(node, Link) and links < MAX_LINKS:
                links += 1
                names += node.target.split("/")[::-1]
            elif isinstance(node, Directory):
                trail.append(node)
            elif node is not None and not names:
                return node
            else:
                raise self._absent(path)
        return trail[-1]

    def _absent(self, path: str) -> NotFound | Unavailable:
        for model in self._catalog.models.values():
            if path == model.name or path.startswith(f"{model.name}/"):
                if model.snapshot is None:
                    return Unavailable(f"model {model.name}: {model.why}")
                return NotFound(f"{model.source.url} has no {path.removeprefix(model.name).strip('/')!r}")
        known = ", ".join(self._catalog.models) or "none"
        return NotFound(f"no model {path.partition('/')[0]!r}; known are: {known}")

    def refresh(self) -> None:
        """Look for new revisions of all models now."""
        LOOP.call(self._catalog.refresh)

    def open(self, node: File[Model]) -> Content:
        """Return the bytes of a file; close it.

        Raises:
            AccessDenied: it is a pickle that the policy of its model denies.
            StoreError: the bytes that decide about that cannot be had.

        """
        reader, _ = LOOP.call(self._catalog.files.open, node)
        return Content(reader, node.size)

    # Directories

    def materialise(self, name: str) -> Path:
        """Return a directory with all files of the model `name`, complete and verified.

        Files are hard links to the cache where that is one file system, else copies; do not change them.
        Calling again costs a look at the store, and nothing else unless the model has changed.

        Raises:
            NotFound: there is no such model.
            ConfigError: its store is too large to list.
            StoreError: it cannot be resolved, or a file cannot be had.
            CacheError: the disk failed.

        """
        return LOOP.call(self._materialise, name)

    async def _materialise(self, name: str) -> Path:
        root = await self._find(name)
        model = self._catalog.models[name]
        if model.offline:
            await self._catalog.refresh(name)  # what is on disk was taken because the store was slow
            root = await self._find(name)
        if isinstance(root, Directory):
            await self._settle(root)
            root = await self._find(name)  # with the members of its archives
        if not isinstance(root, Directory) or model.snapshot is None or not model.snapshot.complete:
            raise ConfigError(f"model {name}: its store is too large to list: name a part of it")
        folder = self._settings.cache.directory / FOLDER / quote(name, safe="")
        target = folder / model.snapshot.digest.removeprefix("sha256:")[:16]
        nodes = dict(_walk(root, ""))
        async with self._filling:
            if not await _on_disk(_is_whole, target, nodes):
                draft = target.with_suffix(".new")
                await _on_disk(_prepare, draft, target)
                await self._fill(draft, nodes)
                await _on_disk(draft.rename, target)
            await _on_disk(_keep_few, folder, target)
        return target

    async def _settle(self, directory: Directory) -> None:
        """Return when all archives in `directory` that are shown as directories have been looked through."""
        await self._catalog.complete(directory)
        for _, node, _ in directory.names()(0):
            if isinstance(node, Directory):
                await self._settle(node)

    async def _fill(self, draft: Path, nodes: Mapping[str, Node]) -> None:
        slots = trio.CapacityLimiter(AT_ONCE)

        async def bring(path: str, node: Node) -> None:
            async with slots:
                await self._bring(draft / path, node)

        try:
            async with trio.open_nursery() as nursery:
                for path, node in nodes.items():
                    nursery.start_soon(bring, path, node)
        except BaseExceptionGroup as group:
            raise unwrapped(group) from None

    async def _bring(self, target: Path, node: Node) -> None:
        """Put one file, link or directory at `target`."""
        match node:
            case Directory():
                await _on_disk(partial(target.mkdir, parents=True, exist_ok=True))
            case Link():
                await _on_disk(_make, target, partial(target.symlink_to, node.target))
            case Text():
                await _on_disk(_make, target, partial(target.write_bytes, node.content))
            case File():
                reader, _ = await self._catalog.files.open(node)
                try:
                    for start in range(0, node.size, BLOCK):
                        await reader.place(start, BLOCK)  # which returns when it has arrived
                    await self._take(target, node, reader)
                finally:
                    reader.close()

    async def _take(self, target: Path, node: File[Model], reader: Reader) -> None:
        """Put what `reader` reads, which has arrived and was verified, at `target`."""
        loan = await reader.lend() if node.size else None
        if loan is not None:
            try:
                await _on_disk(_make, target, partial(_link, loan, target, node.mtime))
            finally:
                await trio.to_thread.run_sync(loan.close)
            return
        # The cache has no room for it, or no working disk: it goes from the fetch path to its place.
        await _on_disk(_make, target, target.touch)
        with target.open("wb", buffering=0) as file:
            for start in range(0, node.size, BLOCK):
                await _on_disk(file.write, await reader.read(start, BLOCK))
        await _on_disk(_finish, target, node.mtime)


@contextlib.contextmanager
def opened(settings: Settings) -> Iterator[Local]:
    """Give the models of `settings`, and the cache back in the end.

    Raises:
        CacheError: the cache cannot be had.
        StoreError: a model that may not be missing cannot be resolved.

    """
    local = Local(settings)
    LOOP.call(local.begin)
    try:
        yield local
    finally:
        LOOP.call(local.end)


class Content:
    """The `size` bytes of one file, for any thread but the loop's."""

    def __init__(self, reader: Reader, size: int) -> None:
        self.size = size
        self._reader = reader
        self._token = LOOP.token

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes ``[start, stop)``, fewer only at the end of the file.

        Raises:
            StoreError: they cannot be had.

        """
        size = max(0, stop - start)
        return bytes(trio.from_thread.run(self._reader.read, start, size, trio_token=self._token))

    def close(self) -> None:
        """Let go of the file; closing again does nothing."""
        with contextlib.suppress(trio.RunFinishedError):  # it ended with the loop
            trio.from_thread.run_sync(self._reader.close, trio_token=self._token)


def _walk(directory: Directory, prefix: str) -> Iterator[tuple[str, Node]]:
    """Yield everything below `directory` with its path."""
    for name, node, _ in directory.names()(0):
        path = f"{prefix}{name}"
        yield path, node
        if isinstance(node, Directory):
            yield from _walk(node, f"{path}/")


# On the disk


async def _on_disk(function: Callable[..., T], *arguments: Any) -> T:
    """Return what `function` returns in a thread; what the disk refuses is a CacheError."""
    try:
        return await trio.to_thread.run_sync(function, *arguments)
    except OSError as error:
        raise CacheError(
            f"{error.filename or 'a model'}: {error.strerror}: free the disk or name another cache.dir"
        ) from error


def _is_whole(target: Path, nodes: Mapping[str, Node]) -> bool:
    """Return whether everything is in the directory `target`, as far as names and sizes tell."""
    if not target.is_dir():
        return False
    try:
        for path, node in nodes.items():
            found = (target / path).lstat()
            if isinstance(node, File) and found.st_size != node.size:
                return False
    except OSError:
        return False
    return True


def _prepare(draft: Path, target: Path) -> None:
    """Make an empty directory, and see that nothing is in the place it will have."""
    for old in (draft, target):
        if old.exists():
            shutil.rmtree(old)
    draft.mkdir(mode=0o700, parents=True)


def _make(target: Path, make: Callable[[], object]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    make()


def _link(loan: Loan, target: Path, mtime: float) -> None:
    """Give the file that was lent the name `target`; copy it where that cannot be."""
    try:
        loan.link(target)
    except OSError as error:
        if error.errno not in UNLINKABLE:
            raise
        log.debug("%s is copied: %s", target, error)
        shutil.copyfile(f"/proc/self/fd/{loan.fileno()}", target)
        _finish(target, mtime)


def _finish(target: Path, mtime: float) -> None:
    os.utime(target, (mtime, mtime))
    target.chmod(0o400)


def _keep_few(folder: Path, target: Path) -> None:
    """Note that `target` is in use, and remove all directories but the `KEPT` that were used last."""
    os.utime(target)
    used = sorted(folder.iterdir(), key=lambda path: path.lstat().st_mtime, reverse=True)
    for old in used[KEPT:]:
        shutil.rmtree(old)
