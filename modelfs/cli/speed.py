"""``modelfs bench``: how fast is a store from this machine, without a mount and through one?"""

from __future__ import annotations

import logging
import os
import stat
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio

from modelfs import control
from modelfs.cache import Data, Pipe
from modelfs.cli import launch
from modelfs.config import Settings
from modelfs.errors import ConfigError, NotFound, unwrapped
from modelfs.fetch.client import RangeClient
from modelfs.fetch.source import Source
from modelfs.fuse import mountpoint
from modelfs.metrics import Metrics
from modelfs.stores import open_store
from modelfs.types import BLOCK, Entry, Span

Progress = Callable[[Mapping[str, Any]], None]
"""Takes ``{"name": …, "done": bytes, "total": bytes}`` as the work goes on."""

MODEL = "bench"
"""The name under which the store is mounted."""

LOOK = 4096
"""Bytes of a look into the file that measures how long the store takes to answer."""

MIB = 1024 * 1024


def measure(settings: Settings, path: str, most: int, progress: Progress) -> dict[str, Any]:
    """Measure the store that `settings` has as its only model; nothing is left behind.

    One file is downloaded as fast as the range client can, then read through a new mount with an empty cache,
    and again from the cache; the downloaded copy tells what this disk does.

    Args:
        settings: as for a mount; mountpoint, cache and log are replaced by temporary ones beside its cache.
        path: of the file in the store; empty for the largest.
        most: bytes that are read of it at the most.
        progress: called while bytes come in.

    Returns:
        ``url``, ``path``, ``bytes``, ``transport``, ``why`` (of the transport), ``answer_seconds``, and
        speeds in bytes per second: ``download``, ``cold``, ``warm``, ``local``.

    Raises:
        ModelfsError: the store cannot be read, the cache disk not be written, or nothing be mounted.

    """
    logging.getLogger("modelfs").addHandler(logging.NullHandler())  # errors say it all
    settings.cache.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    beside = settings.cache.directory.parent
    with tempfile.TemporaryDirectory(prefix="modelfs-bench-", dir=beside) as directory:
        work = Path(directory)
        copy = work / "copy"
        try:
            entry, found = trio.run(_download, settings, path, most, copy, progress)
        except BaseExceptionGroup as group:
            raise unwrapped(group) from None
        found["local"] = _read(copy, most, "local", progress)
        place = work / "mount"
        place.mkdir()
        chosen = replace(
            settings,
            mountpoint=place,
            cache=replace(settings.cache, directory=work / "cache"),
            log_file=work / "log",
        )
        mountpoint.prepare(place, allow_other=False)
        launch.background(chosen)
        try:
            model = place / MODEL
            file = model if stat.S_ISREG(model.stat().st_mode) else model / entry.path
            found["cold"] = _read(file, most, "cold", progress)
            _read(file, most, "settle", progress, forget=True)  # what has come in is checked meanwhile
            found["warm"] = _read(file, most, "warm", progress, forget=True)
            transport = control.ControlClient(control.socket_path(place)).status()["transport"]
        finally:
            launch.end(place, lazy=True)
    return found | {"transport": transport["name"], "why": transport["why"]}


async def _download(
    settings: Settings, path: str, most: int, copy: Path, progress: Progress
) -> tuple[Entry, dict[str, Any]]:
    """Download into `copy`; return which file, and what was measured so far."""
    model = settings.models[0]
    metrics = Metrics()
    source = Source(open_store(model.sources[0], model.options), metrics)
    snapshot = await source.store.snapshot()
    entry = _chosen(snapshot.entries, path)
    if entry is None and path:
        entry = await source.store.entry(path)
    if entry is None or not entry.size:
        raise NotFound(f"{snapshot.url} has no file to read: name one as PATH")
    size = min(entry.size, most)
    async with RangeClient(metrics=metrics, connections=settings.connections) as client:

        async def fetch(span: Span, fd: int) -> None:
            await client.fetch(await source.location(entry), span, entry.size, _File(fd))

        fd = os.open(copy, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            started = time.perf_counter()
            middle = (entry.size - min(LOOK, entry.size)) // 2
            await fetch(Span(middle, middle + min(LOOK, entry.size)), fd)
            answered = time.perf_counter() - started
            os.ftruncate(fd, 0)
            starts = list(range(0, size, BLOCK))[::-1]
            done = 0

            async def work() -> None:
                nonlocal done
                while starts:
                    start = starts.pop()
                    span = Span(start, min(start + BLOCK, size))
                    await fetch(span, fd)
                    done += len(span)
                    progress({"name": "download", "done": done, "total": size})

            started = time.perf_counter()
            async with trio.open_nursery() as nursery:
                for _ in range(settings.connections):
                    nursery.start_soon(work)
            seconds = time.perf_counter() - started
        finally:
            os.close(fd)
    return entry, {
        "url": snapshot.url,
        "path": entry.path,
        "bytes": size,
        "answer_seconds": answered,
        "download": size / seconds,
    }


def _chosen(entries: Mapping[str, Entry], path: str) -> Entry | None:
    """Return the entry at `path`, or the largest file."""
    if path:
        return entries.get(path)
    files = [entry for entry in entries.values() if entry.kind == "file"]
    return max(files, key=lambda entry: entry.size, default=None)


class _File:
    """A sink that writes into a file; every range must come as it was asked for."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def begin(self, span: Span) -> None:
        if len(span) > BLOCK:
            raise ConfigError("the store ignores ranges, so that a download is not comparable with a mount")

    def write(self, offset: int, data: Data) -> None:
        if isinstance(data, Pipe):
            data.move(self._fd, offset, len(data))
        else:
            os.pwrite(self._fd, data, offset)


def _read(path: Path, most: int, name: str, progress: Progress, *, forget: bool = False) -> float:
    """Read a file from its start, without the pages that the kernel has of it if it shall `forget` them.

    A mount's file loses its own pages so, not those of the cache file behind it. Returns bytes per second.
    """
    buffer = memoryview(bytearray(MIB))
    with path.open("rb", buffering=0) as file:
        size = min(os.fstat(file.fileno()).st_size, most)
        if forget:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started, done = time.perf_counter(), 0
        while done < size:
            done += file.readinto(buffer[: size - done])
            progress({"name": name, "done": done, "total": size})
        return size / (time.perf_counter() - started)
