"""What readers do, each in a process of its own, forked from one that has imported what they need.

``python -m bench.work`` reads lines, JSON lists of the name of a work, seconds it may take, a path, and
arguments; it answers each with a line: a list, mostly of the seconds of each repetition, or the text of what
went wrong. Works know nothing of modelfs: a path is a path. Before each repetition of a warm work the pages
of the file as read through the mount are dropped; those of the cache file behind the mount, or of the local
file of the baseline, stay.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import crc32c
import torch
from safetensors import safe_open
from transformers import BertModel
from transformers.utils import logging

MIB = 1 << 20
SEED = 20240521

REPEAT_SECONDS = 1.0
"""Warm works are repeated while less than this has passed, at most `REPEATS` times."""
REPEATS = 7


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    for line in sys.stdin:
        name, limit, path, *arguments = json.loads(line)
        print(json.dumps(_forked(limit, WORKS[name], Path(path), *arguments)), flush=True)


def _forked(limit: float, work: Callable[..., list[float]], *arguments: object) -> list[float] | str:
    """Do a work in a process of its own and return its values, or what went wrong."""
    out, into = os.pipe()
    child = os.fork()
    if not child:
        try:
            answer: list[float] | str = work(*arguments)
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        with open(into, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(into)
    with open(out) as pipe:
        if not select.select([pipe], [], [], limit)[0]:
            os.kill(child, signal.SIGKILL)
        answer = pipe.read()
    os.waitpid(child, 0)
    return json.loads(answer) if answer else f"not done after {limit:.0f} s"


def read(path: Path) -> list[float]:
    """Read a file from start to end, once, MiB by MiB."""
    started = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        _exhaust(file.fileno())
    return [time.perf_counter() - started]


def read_again(path: Path) -> list[float]:
    """Read a file that is in the cache."""

    def once(fd: int) -> float:
        started = time.perf_counter()
        _exhaust(fd)
        return time.perf_counter() - started

    return _repeat(path, once)


def map_again(path: Path) -> list[float]:
    """Load a safetensors file that is in the cache: map it, touch each page of each tensor."""

    def once(fd: int) -> float:
        started = time.perf_counter()
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                tensors.get_tensor(name).view(torch.uint8).flatten()[:: mmap.PAGESIZE].sum()
        return time.perf_counter() - started

    return _repeat(path, once)


def share(path: Path, processes: int) -> list[float]:
    """Read a file, once, by processes that share one descriptor and take the MiB in turn, with pread."""
    size, count = path.stat().st_size, processes
    with open(path, "rb", buffering=0) as file:
        return [_share(file.fileno(), size, count)]


def share_again(path: Path, processes: int) -> list[float]:
    """Do what `share` does with a file that is in the cache."""
    size, count = path.stat().st_size, processes
    return _repeat(path, lambda fd: _share(fd, size, count))


def random_again(path: Path, length: int, count: int) -> list[float]:
    """Read `count` times `length` bytes at random, aligned places of a file that is in the cache."""
    size, step = path.stat().st_size, length
    chance = random.Random(SEED)
    offsets = [chance.randrange(size // step) * step for _ in range(count)]
    buffer = [bytearray(step)]

    def once(fd: int) -> float:
        started = time.perf_counter()
        for offset in offsets:
            os.preadv(fd, buffer, offset)
        return time.perf_counter() - started

    return _repeat(path, once)


def load(path: Path) -> list[float]:
    """Load a model with transformers, and again with the first answer computed: seconds of both."""
    started = time.perf_counter()
    model = BertModel.from_pretrained(path)
    loaded = time.perf_counter() - started
    answer = model(torch.arange(8).reshape(1, 8)).last_hidden_state
    assert torch.isfinite(answer).all()
    return [loaded, time.perf_counter() - started]


def miss(path: Path, count: int, limit: float) -> list[float]:
    """Open and stat names that are not there, for `limit` seconds at most: seconds, and how many it were."""
    names = [f"{path}/missing-{index:06}.json" for index in range(count)]
    done, started = 0, time.perf_counter()
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.close(os.open(name, os.O_RDONLY))
            raise AssertionError(name)
        with contextlib.suppress(FileNotFoundError):
            os.stat(name)
            raise AssertionError(name)
        done += 1
        if time.perf_counter() - started > limit:
            break
    return [time.perf_counter() - started, done]


def checksum(path: Path) -> list[float]:
    """Read a file and return its CRC-32C."""
    value = 0
    with open(path, "rb", buffering=0) as file:
        while data := file.read(MIB):
            value = crc32c.crc32c(data, value)
    return [value]


def _repeat(path: Path, once: Callable[[int], float]) -> list[float]:
    """Do something with an open file over and over; it returns its seconds, without those to prepare."""
    seconds: list[float] = []
    while len(seconds) < REPEATS and sum(seconds) < REPEAT_SECONDS:
        with open(path, "rb", buffering=0) as file:
            _drop(file.fileno())
            seconds.append(once(file.fileno()))
    return seconds


def _drop(fd: int) -> None:
    """Drop the pages of a file if it is one of a FUSE mount; a local file's pages are those that stay."""
    device = os.fstat(fd).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, source = line.partition(" - ")
        if mount.split()[2] == wanted and source.startswith("fuse"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _exhaust(fd: int) -> None:
    buffer = [bytearray(MIB)]
    while os.readv(fd, buffer):
        pass


def _share(fd: int, size: int, count: int) -> float:
    """Return the seconds from letting `count` forked processes go until the last one has read its part."""
    gate_out, gate_in = os.pipe()
    out, into = os.pipe()
    children = []
    for index in range(count):
        child = os.fork()
        if not child:
            try:
                os.close(gate_in)
                os.read(gate_out, 1)
                buffer = [bytearray(MIB)]
                expected = range(index * MIB, size, count * MIB)
                if all(os.preadv(fd, buffer, start) == min(MIB, size - start) for start in expected):
                    os.write(into, f"{time.perf_counter()}\n".encode())
            finally:
                os._exit(0)
        children.append(child)
    os.close(into)
    started = time.perf_counter()
    os.close(gate_in)  # go
    with open(out) as pipe:
        ended = [float(line) for line in pipe]
    for child in children:
        os.waitpid(child, 0)
    os.close(gate_out)
    assert len(ended) == count, "a process could not read its part"
    return max(ended) - started


WORKS: dict[str, Callable[..., list[float]]] = {
    function.__name__: function
    for function in (
        read,
        read_again,
        map_again,
        share,
        share_again,
        random_again,
        load,
        miss,
        checksum,
    )
}


if __name__ == "__main__":
    main()
