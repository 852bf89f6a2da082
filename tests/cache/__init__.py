"""Shared by the tests of the cache: content, filling objects, and what a crash leaves behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from modelfs.cache import Cache, CacheObject
from modelfs.metrics import Metrics
from modelfs.types import Span, block_count, block_span


def content(size: int, seed: int = 0) -> bytes:
    """Return `size` bytes that differ from block to block and from seed to seed, and are rarely zero."""
    unit = b"".join(((seed * 7919 + i) % 0xFFFF_FFFB + 1).to_bytes(4, "little") for i in range(1021))
    return (unit * (size // len(unit) + 1))[:size]


def open_cache(directory: Path, **options: float) -> Cache:
    return Cache(directory, metrics=Metrics(), **options)  # type: ignore[arg-type]


@contextmanager
def cache_at(directory: Path, **options: float) -> Iterator[Cache]:
    """Open a cache and close it cleanly, but without waiting for the disk, which all tests share."""
    cache = open_cache(directory, **options)
    try:
        yield cache
    finally:
        cache.close(sync=False)


def put(item: CacheObject, data: bytes, *blocks: int) -> None:
    """Write and commit `blocks` of `item` (all if none is named), whose content is `data`."""
    for block in blocks or range(block_count(item.size)):
        span = block_span(block, item.size)
        item.write(span.start, data[span.start : span.stop])
        item.commit(block)


def whole(item: CacheObject) -> bytes:
    return item.read(Span(0, item.size))


def data_file(directory: Path, key: str) -> Path:
    return next((directory / "objects").glob(f"*/{key}.data"))


def table_file(directory: Path, key: str) -> Path:
    return data_file(directory, key).with_suffix(".table")


def crash_image(directory: Path, image: Path, *, machine: bool = True) -> Path:
    """Return a directory with what a crash at this moment would leave; the files are hard links.

    Of the whole machine, or of the process only, as by SIGKILL.
    """

    def link_objects(source: str, target: str) -> object:
        if Path(source).suffix in (".data", ".table"):
            os.link(source, target)
        else:
            shutil.copy2(source, target)
        return target

    shutil.copytree(directory, image, copy_function=link_objects)
    if machine:
        (image / "session").write_text("another boot")
    return image


def damage(path: Path, offset: int) -> None:
    """Flip one bit of a file."""
    mode = path.stat().st_mode
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))
    path.chmod(mode)


@contextmanager
def mounted(directory: Path, *options: str) -> Iterator[Path]:
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", *options, "modelfs-test", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


@contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """Let nobody who opens something in `directory` from now on change it."""
    subprocess.run(["mount", "--bind", str(directory), str(directory)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(directory)], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def opened(cache: Cache, key: str, data: bytes) -> CacheObject:
    item = cache.object(key, len(data))
    put(item, data)
    return item


def stored(cache: Cache, key: str, data: bytes) -> None:
    opened(cache, key, data).close()


def in_threads(jobs: list[Callable[[], object]]) -> None:
    """Run all `jobs` at once and raise what any of them raised."""
    failures: list[BaseException] = []

    def run(job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
