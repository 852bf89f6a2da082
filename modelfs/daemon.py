"""One process for one mount: cache, fetch path, catalog, transport and control API, from start to unmount."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from modelfs import __version__, control, privileges, service
from modelfs.assembly import cache_of, catalog_of, fetcher_of
from modelfs.cache import Cache
from modelfs.config import Settings
from modelfs.contents import Contents, Fetched, Wanted
from modelfs.control.ready import Readiness
from modelfs.errors import MountError, unwrapped
from modelfs.fetch.client import RangeClient
from modelfs.fetch.scrub import Scrubber, Subject, verify
from modelfs.fuse import mountpoint
from modelfs.fuse.ledger import Held
from modelfs.fuse.operations import Operations
from modelfs.fuse.transport import Transport, connect
from modelfs.fuse.tuning import tune
from modelfs.metrics import Metrics
from modelfs.tree import Change, Tree

if TYPE_CHECKING:
    from modelfs.control.app import Tell, Work

log = logging.getLogger(__name__)

Ready = Callable[[dict[str, Any]], None]
"""Is told that the tree answers, with the parts of the status that are of interest then."""

ANSWER_SECONDS = 30.0
"""How long a mount that was just made may take to answer."""

STATES = ("ready", "offline", "resolving", "unavailable")
"""What is counted of the models; those that are offline are ready too."""

DRAIN_SECONDS = 10.0
"""How long open files are served after the daemon was asked to stop."""

TOLD_SECONDS = 5.0
"""How long a refresh waits until the kernel knows; a lookup that waits for a store may hold that up."""


def run(settings: Settings, *, ready: Ready, held: Held | None = None) -> bool:
    """Mount, call `ready` when the tree answers, and serve until it is unmounted or SIGTERM or SIGINT comes.

    Args:
        settings: what to mount, and where.
        ready: called once.
        held: what a holder keeps. If an earlier daemon had mounted already, its mount is taken over. If
            it is kept over the holder's end too, signals leave the mount to a successor.

    Returns whether the mount was left to a successor.

    Raises:
        ModelfsError: the mount could not be made; nothing is left mounted then.
        KeyboardInterrupt: SIGINT came before it was made.

    """
    try:
        return trio.run(partial(_main, settings, ready, held), strict_exception_groups=True)
    except BaseExceptionGroup as group:
        raise unwrapped(group) from None


async def _main(settings: Settings, ready: Ready, held: Held | None) -> bool:
    metrics = Metrics()
    trio.lowlevel.add_instrument(metrics.loop_lag)
    place = mountpoint.canonical(settings.mountpoint)
    if not (held and held.mounted):
        await trio.to_thread.run_sync(partial(mountpoint.prepare, place, allow_other=settings.allow_other))
    web = _web_listener(settings, must=not (held and held.mounted))
    cache = await cache_of(settings, metrics)
    client = RangeClient(metrics=metrics, connections=settings.connections)
    left = False
    try:
        async with trio.open_nursery() as nursery:
            daemon = Daemon(settings, nursery, cache, client, metrics, held, web)
            left = await daemon.serve(ready)
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            client.close()
            if web is not None:
                web.close()
            # A successor shall not wait for the disk.
            await trio.to_thread.run_sync(partial(cache.close, sync=not left))
    return left


def _web_listener(settings: Settings, *, must: bool) -> socket.socket | None:
    """Listen where the settings say; who takes a mount over keeps it even if that cannot be had."""
    if settings.http is None:
        return None
    try:
        return control.web_listener(settings.http)
    except MountError as error:
        if must:
            raise
        log.error("%s", error)
        return None


def _address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if sock.family == socket.AF_INET6 else f"{host}:{port}"


class Daemon:
    """A mount while it lives; also what the control API drives."""

    def __init__(
        self,
        settings: Settings,
        nursery: trio.Nursery,
        cache: Cache,
        client: RangeClient,
        metrics: Metrics,
        held: Held | None,
        web: socket.socket | None,
    ) -> None:
        self.metrics = metrics
        self._held = held
        self._succeeding = held is not None and held.mounted
        self._serving = self._succeeding
        self._left = False
        self._settings = settings
        self._nursery = nursery
        self._cache = cache
        self._place = mountpoint.canonical(settings.mountpoint)
        self._started = time.time()
        self._stopping = trio.Event()
        self._readiness = Readiness(self._place)
        self._web = web
        self._web_url = f"http://{_address(web)}" if web else None
        self._transport: Transport | None = None
        self._why = ""
        self._fetcher = fetcher_of(settings, nursery, cache, client, metrics)
        self._scrubber = Scrubber(
            cache,
            lambda: self._catalog.subjects(),
            self._fetcher.distrust,
            lambda: self._fetcher.busy,
            settings.scrub,
        )
        self._tree = Tree()
        self._early: list[Change] = []
        """What was new before there was a transport: only who takes a mount over has to tell."""
        self._untold: set[trio.Event] = set()
        """One for each notice that the kernel is being given of what is new."""
        self._catalog = catalog_of(settings, self._tree, cache, self._fetcher, metrics, self._invalidate)
        self._contents = Contents(self._catalog, cache, self._fetcher)
        for state in STATES:
            metrics.models.labels(state).set_function(partial(self._count_models, state))

    def _count_models(self, state: str) -> int:
        models = list(self._catalog.models.values())
        shown = ("offline" if model.offline and model.state == "ready" else model.state for model in models)
        return sum(each == state for each in shown)

    def _invalidate(self, changes: list[Change]) -> None:
        if self._transport is None:
            self._early += changes
        elif changes:
            told = trio.Event()
            self._untold.add(told)
            self._nursery.start_soon(self._tell, self._transport, changes, told)

    async def _tell(self, transport: Transport, changes: list[Change], told: trio.Event) -> None:
        try:
            await transport.invalidate(changes)
        finally:
            told.set()
            self._untold.discard(told)

    async def serve(self, ready: Ready) -> bool:
        """Mount and serve until the end; see :func:`run`."""
        settings = self._settings
        await self._catalog.start(self._nursery, keep_going=settings.keep_going, at_once=self._succeeding)
        self._transport, self._why = connect(
            settings.transport,
            lambda first: Operations(self._tree, self._catalog, self.metrics, first=first),
            self._place,
            allow_other=settings.allow_other,
            cache=self._cache.directory,
            held=self._held,
        )
        name, passthrough = self._transport.name, str(self._transport.passthrough).lower()
        self.metrics.mount.labels(name, passthrough).set(1)
        self.metrics.handovers.inc(self._held.handovers if self._held else 0)
        if self._succeeding:
            self._invalidate([*self._early])
        self._early.clear()
        log.info(
            "mounted on %s by %s (%s), modelfs %s, pid %d",
            self._place,
            self._transport.name,
            self._why,
            __version__,
            os.getpid(),
        )
        gc.freeze()  # what is there now stays: looking through it for garbage would keep readers waiting
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_signals)
                nursery.start_soon(self._catalog.run, settings.refresh)
                if settings.scrub:
                    nursery.start_soon(self._scrubber.run)
                nursery.start_soon(self._stop_when_asked, nursery.cancel_scope)
                nursery.start_soon(self._announce, ready)
                await self._transport.run()
                log.info("left %s to a successor" if self._left else "unmounted from %s", self._place)
                nursery.cancel_scope.cancel()
        finally:
            # Whatever else went wrong: a successor can go on as long as the mount is there.
            lost = self._held is None or not self._serving or self._stopping.is_set()
            self._transport.close(unmount=lost)
        return self._left

    async def _announce(self, ready: Ready) -> None:
        """Say that the mount is there once it answers.

        No thread of ours may ask: killed while its question is with us, it would wait for an answer, and who
        waits for the end of this process before it lets a successor answer, for ever.
        """
        if why := await Readiness(self._place, ANSWER_SECONDS).why_not():
            raise MountError(f"mounted, but {why}")
        mount = mountpoint.mount_at(self._place)
        if mount is not None:
            await trio.to_thread.run_sync(tune, mount.device)
        with control.announced(control.socket_path(self._place), self._record()) as listener:
            self._serving = True
            ready(self._summary())
            # Only now: a web server takes longer to import than a mount to make.
            app = await trio.to_thread.run_sync(import_module, "modelfs.control.app")
            await app.serve(self, listener, self._web)

    def _record(self) -> control.Record:
        return control.Record(self._place, os.getpid(), self._started, __version__)

    def _summary(self) -> dict[str, Any]:
        models = self._catalog.models.values()
        return {
            "mountpoint": str(self._place),
            "models": [{"name": model.name, "state": model.state, "why": model.why} for model in models],
            "namespaces": list(self._settings.namespaces),
        }

    async def _watch_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                held = self._held
                if held is not None and held.kept and held.mounted and service.listens():
                    log.info("%s: leaving the mount to the next one", signal.Signals(number).name)
                    self.leave()
                else:
                    log.info("%s: unmounting", signal.Signals(number).name)
                    self.stop()

    async def _stop_when_asked(self, serving: trio.CancelScope) -> None:
        """Take the mount out of sight, serve who still reads for a while, then end the session."""
        await self._stopping.wait()
        try:
            await trio.to_thread.run_sync(partial(mountpoint.detach, self._place, lazy=True))
        except MountError as error:
            log.warning("%s", error)
        await trio.sleep(DRAIN_SECONDS)
        log.warning("files are still open %g s after the unmount; they get errors now", DRAIN_SECONDS)
        serving.cancel()

    # -- what the control API asks for -----------------------------------------------------------------

    def stop(self) -> None:
        """Begin to unmount and end; returns at once."""
        self._stopping.set()

    def check_successor(self) -> None:
        """Return if a successor would be started when this daemon left.

        Raises:
            MountError: the mount would be lost.

        """
        if self._held is None or not self._held.mounted:
            raise MountError(f"the mount on {self._place} has no holder: umount and mount again")

    def leave(self) -> None:
        """Begin to leave the mount to a successor; returns at once."""
        if self._transport is not None:
            self._left = True
            self._transport.leave()

    async def unready(self) -> str | None:
        """Return why the mount does not answer; None if it does."""
        if self._stopping.is_set() or self._left:
            return f"{self._place} is being left"
        return await self._readiness.why_not()

    async def refresh(self, model: str | None) -> dict[str, Any]:
        """Resolve one model, or all, now; return their status once new opens see what is new."""
        models = await self._catalog.refresh(model)
        with trio.move_on_after(TOLD_SECONDS):
            for told in list(self._untold):
                await told.wait()
        return {"models": [await self._catalog.files.report(found) for found in models]}

    def verification(self, model: str | None) -> Work:
        """Return what reads the cached content of `model`, or all of it, again; see `control.app.Daemon`."""
        subjects = self._catalog.subjects(model)
        total = sum(subject.present for subject in subjects)

        async def work(tell: Tell) -> dict[str, Any]:
            async def progress(subject: Subject, done: int) -> None:
                await tell({"name": subject.name, "done": done, "total": total})

            return (await verify(self._cache, subjects, self._fetcher.distrust, progress)).to_json()

        return work

    def prefetching(self, model: str, globs: Sequence[str], *, wait: bool) -> Work:
        """Return what fetches files of `model` into the cache; see `control.app.Daemon`."""

        async def work(tell: Tell) -> dict[str, Any]:
            async def progress(name: str, done: int, total: int) -> None:
                await tell({"name": name, "done": done, "total": total})

            wanted = await self._contents.wanted(model, globs)
            if not wait:
                self._nursery.start_soon(self._prefetch, model, wanted)
                return Fetched(len(wanted), sum(each.entry.size for each in wanted)).to_json()
            return (await self._contents.fetch(wanted, progress)).to_json()

        return work

    async def _prefetch(self, model: str, wanted: Sequence[Wanted]) -> None:
        async def progress(name: str, done: int, total: int) -> None:
            log.debug("%s: %d of %d bytes are there", name, done, total)

        report = await self._contents.fetch(wanted, progress)
        log.info("%s: prefetched %d bytes of %d files", model, report.fetched, report.files)
        for failed in report.failed:
            log.warning("%s: not prefetched: %s", failed["name"], failed["why"])

    async def pin(self, model: str) -> dict[str, Any]:
        """Keep what is cached of `model`; see `control.app.Daemon`."""
        return {"models": [await self._catalog.files.report(await self._catalog.pin(model))]}

    async def unpin(self, model: str) -> dict[str, Any]:
        """Undo `pin`; see `control.app.Daemon`."""
        await self._catalog.unpin(model)
        return {"model": model, "pinned": False}

    async def evict(self, model: str, globs: Sequence[str]) -> dict[str, Any]:
        """Evict what is cached of `model`; see `control.app.Daemon`."""
        return await self._contents.evict(model, globs)

    async def collect(self, older_than: float, *, dry_run: bool) -> dict[str, Any]:
        """Evict what was not used for `older_than` seconds; see `control.app.Daemon`."""
        return await self._contents.collect(older_than, dry_run=dry_run)

    async def status(self) -> dict[str, Any]:
        """Return the document of docs/status.md."""
        settings, value = self._settings, self.metrics.value
        read, hit = value("modelfs_read_bytes_total"), value("modelfs_hit_bytes_total")
        usage = self._cache.usage()
        return {
            "version": 1,
            "modelfs": __version__,
            "pid": os.getpid(),
            "holder_pid": os.getppid() if self._held else None,
            "handovers": self._held.handovers if self._held else 0,
            "capabilities": privileges.held(),
            "mountpoint": str(self._place),
            "started": self._started,
            "transport": {
                "name": self._transport.name if self._transport else None,
                "passthrough": self._transport is not None and self._transport.passthrough,
                "why": self._why,
            },
            "http": self._web_url,
            "lock": str(settings.lock) if settings.locked else None,
            "config": str(settings.source_file) if settings.source_file else None,
            "log": str(settings.log_file) if settings.log_file else None,
            "models": [
                await self._catalog.files.report(model) for model in list(self._catalog.models.values())
            ],
            "namespaces": list(settings.namespaces),
            "cache": {
                "directory": str(self._cache.directory),
                "used": usage.used,
                "limit": usage.limit,
                "free": usage.free,
                "objects": usage.objects,
                "pinned": usage.pinned,
                "unclean_start": usage.unclean_start,
                "verity": {"available": usage.unsealable is None, "why": usage.unsealable},
                "scrub": self._scrubber.to_json(),
            },
            "reads": {
                "bytes": int(read),
                "hit_bytes": int(hit),
                "hit_ratio": hit / read if read else None,
                "errors": self._by_kind("modelfs_read_errors_total"),
            },
            "fetch": {
                "bytes": int(value("modelfs_fetched_bytes_total")),
                "requests": int(value("modelfs_store_requests_total")),
                "retries": int(value("modelfs_store_retries_total")),
                "errors": self._by_kind("modelfs_store_errors_total"),
                "in_flight": self._fetcher.in_flight,
            },
            "open_handles": int(value("modelfs_open_handles")),
            "rss_bytes": _rss(),
        }

    def _by_kind(self, name: str) -> Mapping[str, int]:
        kinds: dict[str, int] = {}
        for family in self.metrics.registry.collect():
            for sample in family.samples:
                if sample.name == name and sample.value:
                    kind = sample.labels["kind"]
                    kinds[kind] = kinds.get(kind, 0) + int(sample.value)
        return kinds


def _rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
