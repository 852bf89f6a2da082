"""Many readers at once: threads, processes and forks read right bytes, and nobody disturbs the others."""

from __future__ import annotations

import hashlib
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from tests.mount.harness import DEADLINE, Mounted, mounted
from tests.origin import Origin

BLOCK = 8 * 1024 * 1024
SHARED = "shared.dat"
"""A file of several blocks that is not fetched ahead as weights are; the last block is shorter."""


def noise(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    big = {SHARED: noise(5 * BLOCK + 12345, 0), "shared.safetensors": noise(3 * BLOCK + 1, 1)}
    return big | {f"layer-{number}.bin": noise(200_000 + number, number) for number in range(32)}


@pytest.fixture
def origin(files: dict[str, bytes]) -> Iterator[Origin]:
    with Origin(files) as own:
        yield own


@pytest.fixture
def mount(place: Path, origin: Origin, transport: str) -> Iterator[Mounted]:
    with mounted(place, "--allow-other", sources={"m": origin.url}, transport=transport) as own:
        yield own


PIECE = 5 * 1024 * 1024 // 4
"""The longest range that is asked for past another that will bring it later."""


def fetched_twice(origin: Origin, path: str) -> list[str]:
    """Return the ranges of `path` longer than a piece of which some byte had been asked for before."""
    seen: list[range] = []
    again = []
    for _, name, span in origin.contents():
        if name == path:
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", span)
            assert match, f"{name} was asked for as a whole: {span!r}"
            asked = range(int(match[1]), int(match[2]) + 1)
            if len(asked) <= PIECE:
                continue
            if any(asked.start < other.stop and other.start < asked.stop for other in seen):
                again.append(span)
            seen.append(asked)
    return again


def start(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def outputs(readers: Sequence[subprocess.Popen[str]]) -> list[str]:
    """Return what each reader printed; all must have ended well."""
    found = [reader.communicate(timeout=DEADLINE)[0] for reader in readers]
    assert [reader.returncode for reader in readers] == [0] * len(readers)
    return found


THREADS = """
import hashlib, os, random, sys
from concurrent.futures import ThreadPoolExecutor
path, pieces = sys.argv[1], 400
fd, size = os.open(path, os.O_RDONLY), os.path.getsize(path)
places = random.Random(3)
spans = [(places.randrange(size), places.randrange(1, 300_000)) for _ in range(pieces)]
with ThreadPoolExecutor(16) as threads:
    for span, data in zip(spans, threads.map(lambda span: os.pread(fd, span[1], span[0]), spans)):
        print(*span, hashlib.sha256(data).hexdigest())
"""


def test_threads_read_one_descriptor_at_random_places(
    mount: Mounted, origin: Origin, files: dict[str, bytes]
) -> None:
    out = mount.python(THREADS, str(mount.path / "m" / SHARED))
    rows = [line.split() for line in out.splitlines()]
    assert len(rows) == 400
    for start_at, size, digest in rows:
        assert digest == sha256(files[SHARED][int(start_at) : int(start_at) + int(size)])
    assert fetched_twice(origin, SHARED) == []


MAPPED_THREADS = """
import hashlib, mmap, os, sys
from concurrent.futures import ThreadPoolExecutor
path, parts = sys.argv[1], 24
size = os.path.getsize(path)
step = -(-size // parts)
with open(path, "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
with ThreadPoolExecutor(4) as threads:
    pieces = list(threads.map(lambda n: mapped[n * step:(n + 1) * step], range(parts)[::-1]))
print(hashlib.sha256(b"".join(pieces[::-1])).hexdigest())
"""


def test_threads_fault_one_mapping_from_its_end(
    mount: Mounted, origin: Origin, files: dict[str, bytes]
) -> None:
    out = mount.python(MAPPED_THREADS, str(mount.path / "m" / SHARED))
    assert out.strip() == sha256(files[SHARED])
    assert fetched_twice(origin, SHARED) == []


def test_64_processes_read_the_same_and_other_files(
    mount: Mounted, origin: Origin, files: dict[str, bytes]
) -> None:
    names = [SHARED, "shared.safetensors"] * 16 + [f"layer-{number}.bin" for number in range(32)]
    readers = [start("sha256sum", str(mount.path / "m" / name)) for name in names]
    assert [line.split()[0] for line in outputs(readers)] == [sha256(files[name]) for name in names]
    for name in set(names):
        assert fetched_twice(origin, name) == []
    assert mount.fetched() < 1.3 * sum(map(len, files.values()))


FORKED = """
import hashlib, os, sys
path, children = sys.argv[1], 8
fd, size = os.open(path, os.O_RDONLY), os.path.getsize(path)
step = -(-size // children)
start = os.pread(fd, 10, 0)
for child in range(children):
    if os.fork() == 0:
        data = bytearray()
        while piece := os.pread(fd, min(65536, step - len(data)), child * step + len(data)):
            data += piece
        os.write(1, f"{child} {hashlib.sha256(data).hexdigest()}\\n".encode())
        os._exit(0)
os.close(fd)
for _ in range(children):
    assert os.wait()[1] == 0
"""


def test_forked_processes_read_the_descriptor_they_inherit(mount: Mounted, files: dict[str, bytes]) -> None:
    out = mount.python(FORKED, str(mount.path / "m" / SHARED))
    step = -(-len(files[SHARED]) // 8)
    wanted = {str(n): sha256(files[SHARED][n * step : (n + 1) * step]) for n in range(8)}
    assert dict(line.split() for line in out.splitlines()) == wanted


SHARED_POSITION = """
import hashlib, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
for child in range(6):
    if os.fork() == 0:
        while True:
            data = os.read(fd, 100_000)
            if not data:
                os._exit(0)
            os.write(1, f"{hashlib.sha256(data).hexdigest()}\\n".encode())
for _ in range(6):
    assert os.wait()[1] == 0
"""


def test_processes_that_share_a_file_position_get_each_byte_once(
    mount: Mounted, files: dict[str, bytes]
) -> None:
    data = files["shared.safetensors"]
    out = mount.python(SHARED_POSITION, str(mount.path / "m" / "shared.safetensors"))
    wanted = [sha256(data[at : at + 100_000]) for at in range(0, len(data), 100_000)]
    assert sorted(out.split()) == sorted(wanted)


TWO_STEPS = """
import hashlib, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
print(hashlib.sha256(os.pread(fd, 4096, 0)).hexdigest(), flush=True)
rest = os.pread(fd, os.fstat(fd).st_size, 4096)
print(hashlib.sha256(rest).hexdigest())
"""


def test_readers_killed_while_they_wait_disturb_nobody(
    mount: Mounted, origin: Origin, files: dict[str, bytes]
) -> None:
    release = threading.Event()
    origin.held[SHARED] = (1024 * 1024, release)
    path = str(mount.path / "m" / SHARED)
    readers = [start(sys.executable, "-c", TWO_STEPS, path) for _ in range(12)]
    for reader in readers:
        assert reader.stdout is not None
        assert reader.stdout.readline().strip() == sha256(files[SHARED][:4096])
        wait_until(lambda pid=reader.pid: psutil.Process(pid).status() in WAITING)
    doomed, others = readers[:8], readers[8:]
    for reader in doomed:
        reader.kill()
    release.set()
    assert [out.strip() for out in outputs(others)] == [sha256(files[SHARED][4096:])] * 4
    for reader in doomed:
        reader.communicate(timeout=DEADLINE)
        assert reader.returncode == -signal.SIGKILL
    assert fetched_twice(origin, SHARED) == []
    wait_until(lambda: mount.status()["open_handles"] == 0)


WAITING = (psutil.STATUS_SLEEPING, psutil.STATUS_DISK_SLEEP)


def wait_until(condition: Callable[[], bool]) -> None:
    """Ask again and again, for what only the kernel or the daemon knows; fail after `DEADLINE`."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
