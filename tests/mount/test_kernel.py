"""What the kernel transport promises beyond pyfuse3: reads without the daemon, and nothing left behind."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from modelfs import control
from modelfs.fuse import mountpoint
from tests.mount.harness import Mounted, Reader, alone, eventually, mounted
from tests.origin import Origin

MIB = 1 << 20
BLOCK = 8 * MIB
TRANSPORT = "kernel"

OPENINGS = int(os.environ.get("MODELFS_TEST_OPENINGS", "1200"))
"""How often files are opened to see what that leaves behind; 100,000 take some minutes."""


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin({"w.bin": noise(2 * BLOCK + 77), "small.dat": noise(3 * MIB, 2), "tiny.json": b"{}"}) as own:
        yield own


@pytest.fixture
def mount(place: Path, origin: Origin) -> Iterator[Mounted]:
    with mounted(place, sources={"m": origin.url}, transport=TRANSPORT) as own:
        yield own


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Let the process do nothing meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: state(pid) == "T")
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def cached(mount: Mounted, path: Path) -> int:
    code = "import os,sys; print(os.getxattr(sys.argv[1], 'user.modelfs.cached_bytes').decode())"
    return int(mount.python(code, str(path)))


# -- without the daemon --------------------------------------------------------------------------------

OPENED = """
import hashlib
fd = os.open(sys.argv[1], os.O_RDONLY)
step('open')
size = os.fstat(fd).st_size
read = b''.join(os.pread(fd, 1 << 20, start) for start in range(0, size, 1 << 20))
with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
    print(hashlib.sha256(read).hexdigest(), hashlib.sha256(mapped).hexdigest(), flush=True)
"""
"""Code for a `Reader`: opens a file, then reads and maps all of it."""


def test_a_complete_file_is_read_while_the_daemon_stands_still(mount: Mounted, origin: Origin) -> None:
    path = mount.path / "m/w.bin"
    mount.run("sha256sum", str(path))
    with Reader(OPENED, path) as reader:
        assert reader.said() == "open"
        mount.drop_pages()
        with stopped(mount.status()["pid"]):
            reader.go_on()
            assert reader.said().split() == [sha256(origin.files["w.bin"])] * 2


def test_a_small_file_is_complete_once_it_is_open(mount: Mounted, origin: Origin) -> None:
    with Reader(OPENED, mount.path / "m/small.dat") as reader:
        assert reader.said() == "open"
        with stopped(mount.status()["pid"]):
            reader.go_on()
            assert reader.said().split() == [sha256(origin.files["small.dat"])] * 2


# -- nothing is left behind ----------------------------------------------------------------------------

OPENS = """
import os, sys
turns, paths = int(sys.argv[1]), sys.argv[2:]
for turn in range(turns):
    for path in paths:
        os.close(os.open(path, os.O_RDONLY))
"""


def test_opening_leaves_nothing_behind(mount: Mounted, origin: Origin) -> None:
    paths = [str(mount.path / "m" / name) for name in origin.files]
    pid = mount.status()["pid"]
    mount.python(OPENS, "50", *paths)
    eventually(lambda: mount.metric("modelfs_open_handles") == 0)
    before, system = descriptors(pid), files_of_the_system()
    for begun in range(0, OPENINGS, 15_000):  # each process has the deadline of the harness
        mount.python(OPENS, str(min(15_000, OPENINGS - begun) // len(paths)), *paths)
    eventually(lambda: mount.metric("modelfs_open_handles") == 0 and descriptors(pid) <= before + 5)
    # Each backing id holds a file of the kernel; others on this machine open files, too.
    eventually(lambda: files_of_the_system() < system + OPENINGS // 2)


def files_of_the_system() -> int:
    return int(Path("/proc/sys/fs/file-nr").read_text().split()[0])


MAPPED = """
import hashlib
fd = os.open(sys.argv[1], os.O_RDONLY)
mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
step('mapped')
print(hashlib.sha256(mapped).hexdigest(), flush=True)
"""


def test_what_the_kernel_reads_is_not_evicted(place: Path) -> None:
    files = {f"{number}.dat": noise(BLOCK + number, number) for number in range(5)}
    with (
        Origin(files) as origin,
        mounted(place, "--cache-size", "20MiB", sources={"m": origin.url}, transport=TRANSPORT) as mount,
    ):
        first, *others = (mount.path / "m" / name for name in files)
        mount.run("sha256sum", str(first))
        with Reader(MAPPED, first) as reader:
            assert reader.said() == "mapped"
            for other in others * 2:
                assert mount.run("sha256sum", str(other)).stdout.split()[0] == sha256(files[other.name])
                assert cached(mount, first) == len(files[first.name])
            assert mount.status()["cache"]["used"] <= 20 * MIB
            mount.drop_pages()
            with stopped(mount.status()["pid"]):
                reader.go_on()
                assert reader.said() == sha256(files[first.name])
            assert reader.process.wait(30) == 0
        for other in others:
            mount.run("sha256sum", str(other))
        assert cached(mount, first) == 0


# -- from cold to complete -----------------------------------------------------------------------------

HAMMER = """
import random, select
model, originals = sys.argv[1:]
chance, held, rounds = random.Random(os.getpid()), [], 0
page = mmap.mmap(-1, 1 << 16)
def pread(fd, start, size):
    return os.pread(fd, size, start)
def direct(fd, start, size):
    return page[:os.preadv(fd, [page], start)][:size]
def fault(fd, start, size):
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
        return mapped[start:start + size]
while not select.select([sys.stdin], [], [], 0)[0]:
    name = chance.choice(os.listdir(originals))
    way = chance.choice([pread, direct, fault])
    fd = os.open(os.path.join(model, name), os.O_DIRECT if way is direct else os.O_RDONLY)
    held.append(fd)
    with open(os.path.join(originals, name), 'rb') as file:
        for _ in range(3):
            start = chance.randrange(os.fstat(fd).st_size) // 4096 * 4096
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            assert way(fd, start, 50_000) == os.pread(file.fileno(), 50_000, start), (name, way, start)
    while len(held) > chance.randrange(3):
        os.close(held.pop(chance.randrange(len(held))))
    rounds += 1
print(rounds, flush=True)
"""
"""Code for a `Reader`: opens, reads and maps files until it is told to stop; some stay open for a while."""


def test_files_become_complete_under_their_readers(place: Path) -> None:
    files = {f"{number}.bin": noise(2 * BLOCK + 77, number) for number in range(4)}
    originals = place / "originals"
    originals.mkdir()
    for name, data in files.items():
        (originals / name).write_bytes(data)
    with Origin(files) as origin:
        origin.pause = 0.02
        origin.digests["0.bin"] = sha256(files["0.bin"])
        with mounted(place, sources={"m": origin.url}, transport=TRANSPORT) as mount, ExitStack() as stack:
            readers = [stack.enter_context(Reader(HAMMER, mount.path / "m", originals)) for _ in range(3)]
            whole = sum(map(len, files.values()))
            eventually(lambda: mount.status()["models"][0]["cached_bytes"] == whole, 60)
            before = mount.metric("modelfs_fuse_requests_total", operation="open")
            eventually(lambda: mount.metric("modelfs_fuse_requests_total", operation="open") > before + 30)
            for reader in readers:
                reader.go_on()
            assert min(int(reader.said()) for reader in readers) > 0
            # In the end all of them are read by the kernel.
            eventually(lambda: mount.metric("modelfs_open_handles") == 0)
            read = mount.metric("modelfs_fuse_requests_total", operation="read")
            mount.drop_pages()
            for name, data in files.items():
                assert mount.run("sha256sum", str(mount.path / "m" / name)).stdout.split()[0] == sha256(data)
            assert mount.metric("modelfs_fuse_requests_total", operation="read") == read


# -- where the cache lies ------------------------------------------------------------------------------


@contextmanager
def file_system(kind: str, place: Path) -> Iterator[Path]:
    """Yield a directory on a file system of `kind`, the last word; the words before it say what is below."""
    below, _, last = kind.rpartition(" ")
    with ExitStack() as stack:
        lower = stack.enter_context(file_system(below, place)) if below else place
        where = place / kind.replace(" ", "-")
        where.mkdir()
        options = "mode=755"
        if last == "overlay":
            room = stack.enter_context(file_system("tmpfs", where))
            for name in ("upper", "work"):
                (room / name).mkdir()
            options = f"lowerdir={lower},upperdir={room}/upper,workdir={room}/work"
        subprocess.run(["mount", "-t", last, "none", "-o", options, where], check=True)
        stack.callback(subprocess.run, ["umount", where], check=True)
        yield where


@pytest.mark.parametrize(
    ("kind", "refusal"),
    [
        ("tmpfs", None),
        ("tmpfs overlay", None),
        ("tmpfs overlay overlay", "lies on too many others"),
        ("ramfs", "does not allow O_DIRECT"),
    ],
)
def test_a_cache_anywhere_serves_and_status_says_how(
    kind: str, refusal: str | None, place: Path, origin: Origin
) -> None:
    with (
        file_system(kind, place) as disk,
        mounted(place, sources={"m": origin.url}, transport=TRANSPORT, cache=disk / "cache") as mount,
    ):
        transport = mount.status()["transport"]
        assert transport["name"] == "kernel"
        assert transport["passthrough"] is (refusal is None)
        assert (refusal or "the kernel reads complete files without the daemon") in transport["why"]
        for _ in range(2):  # cold, then complete
            for name, data in origin.files.items():
                assert mount.python(ALL_WAYS, str(mount.path / "m" / name)).split() == [sha256(data)] * 3
            mount.drop_pages()


ALL_WAYS = """
import hashlib, mmap, os, sys
path = sys.argv[1]
with open(path, 'rb', 0) as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
    print(hashlib.sha256(file.read()).hexdigest(), hashlib.sha256(mapped).hexdigest())
direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
buffer, hasher, offset = mmap.mmap(-1, 1 << 20), hashlib.sha256(), 0
while got := os.preadv(direct, [buffer], offset):
    hasher.update(memoryview(buffer)[:got])
    offset += got
print(hasher.hexdigest())
"""


def test_where_the_kernel_cannot_read_alone_libfuse_is_taken(place: Path, origin: Origin) -> None:
    with (
        file_system("tmpfs overlay overlay", place) as disk,
        mounted(place, sources={"m": origin.url}, transport="auto", cache=disk / "cache") as mount,
    ):
        transport = mount.status()["transport"]
        assert transport["name"] == "pyfuse3"
        assert "lies on too many others" in transport["why"]
        assert mount.run("cat", str(mount.path / "m/tiny.json")).stdout == "{}"


# -- signals -------------------------------------------------------------------------------------------


WAITERS = {
    "open": ("small.dat", "done = libc.open(path, os.O_RDONLY) >= 0"),
    "read": ("w.bin", "fd = os.open(path, os.O_RDONLY)\ndone = libc.pread(fd, room, 4096, far)"),
    "direct": (
        "w.bin",
        "fd = os.open(path, os.O_RDONLY | os.O_DIRECT)\ndone = libc.pread(fd, room, 4096, far)",
    ),
    "fault": (
        "w.bin",
        "with open(path, 'rb') as file:\n    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)\n"
        "done = mapped[far.value]",
    ),
}
"""What a process may wait in: the file, and Python code that ends once bytes far into it are there."""

WAITER = """
import ctypes, signal
rung = []
signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
signal.siginterrupt(signal.SIGALRM, True)
libc = ctypes.CDLL(None, use_errno=True)
path, far = sys.argv[1].encode(), ctypes.c_long(12 << 20)
page = mmap.mmap(-1, 4096)
room = ctypes.byref(ctypes.c_char.from_buffer(page))
print('ready', flush=True)
%s
print(done, ctypes.get_errno(), bool(rung), flush=True)
"""
"""Code for a `Reader`: does one thing once, without Python's own second attempt after a signal."""


@pytest.fixture(params=WAITERS)
def waiting(request: pytest.FixtureRequest, mount: Mounted, origin: Origin) -> Iterator[Reader]:
    with waiter(request.param, mount, origin) as reader:
        yield reader


@contextmanager
def waiter(way: str, mount: Mounted, origin: Origin) -> Iterator[Reader]:
    """A process that waits for a store that sends nothing."""
    name, code = WAITERS[way]
    origin.silent.set()
    with Reader(WAITER % code, mount.path / "m" / name) as reader:
        assert reader.said() == "ready"
        eventually(lambda: any(path == name for _, path, _ in origin.contents()))
        eventually(lambda: state(reader.process.pid) in "SD")
        yield reader


def test_a_signal_does_not_end_a_read(waiting: Reader, origin: Origin) -> None:
    for _ in range(3):
        os.kill(waiting.process.pid, signal.SIGALRM)
    origin.silent.clear()
    origin.silence_over.set()
    _, error, rung = waiting.said().split()
    assert (error, rung) == ("0", "True")
    assert waiting.process.wait(30) == 0


@pytest.fixture
def unseeing(place: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mounted]:
    """A mount whose daemon lives in a PID namespace of its own, as in a container."""
    path = place / "models"
    path.mkdir()
    words = ["mount", str(path), "--foreground", f"--cache-dir={place}/cache", f"--source=m={origin.url}"]
    for name, value in alone(place).items():
        monkeypatch.setenv(name, value)
    with (place / "log").open("wb") as log:
        daemon = subprocess.Popen(
            ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-m", "modelfs", *words],
            stdout=log,
            stderr=log,
        )
        try:
            eventually(lambda: control.find(path) is not None and (path / "m").is_dir())
            yield Mounted(path, place / "cache", place / "log", alone(place))
        finally:
            mountpoint.detach(path, lazy=True)
            daemon.kill()
            daemon.wait()


@pytest.mark.parametrize("way", ["open", "direct"])  # the kernel tells of signals to these only
def test_a_signal_does_not_end_a_read_of_a_process_that_is_not_seen(
    unseeing: Mounted, origin: Origin, way: str
) -> None:
    with waiter(way, unseeing, origin) as reader:
        os.kill(reader.process.pid, signal.SIGALRM)
        eventually(lambda: unseeing.metric("modelfs_fuse_requests_total", operation="interrupt") > 0)
        assert (
            unseeing.run("ls", str(unseeing.path)).returncode == 0
        )  # whatever it makes of it, it has done now
        test_a_signal_does_not_end_a_read(reader, origin)


def test_who_waits_for_a_store_can_be_killed(waiting: Reader, mount: Mounted, origin: Origin) -> None:
    os.kill(waiting.process.pid, signal.SIGALRM)  # the kernel tells of the first signal only
    os.kill(waiting.process.pid, signal.SIGKILL)
    assert waiting.process.wait(5) == -signal.SIGKILL
    origin.silent.clear()
    assert mount.run("cat", str(mount.path / "m/tiny.json")).stdout == "{}"


# -- messages ------------------------------------------------------------------------------------------

ASKS = r"""
import errno, os, sys
def answer(ask, *words):
    try:
        return ask(*words)
    except OSError as error:
        return errno.errorcode[error.errno]
directory, file = os.fsencode(sys.argv[1]), sys.argv[2]
for name in (b'\xff\xfe', 'm\xfc'.encode('latin-1'), b'\x80' * 255, b'\x80' * 256):
    print(answer(os.stat, directory + b'/' + name))
fd = os.open(os.path.join(sys.argv[1], file), os.O_RDONLY)
size = os.fstat(fd).st_size
for offset in (0, 4096, 1 << 20, size - 1, size, 1 << 40):
    print(answer(os.lseek, fd, offset, os.SEEK_DATA), answer(os.lseek, fd, offset, os.SEEK_HOLE))
"""


@pytest.mark.parametrize("file", ["w.bin", "small.dat"])
def test_strange_questions_are_answered_as_by_a_disk(
    file: str, mount: Mounted, place: Path, origin: Origin
) -> None:
    (place / file).write_bytes(origin.files[file])
    assert mount.python(ASKS, str(mount.path / "m"), file) == mount.python(ASKS, str(place), file)


def test_requests_are_counted_by_what_they_ask_for(place: Path, origin: Origin, transport: str) -> None:
    with mounted(place, sources={"m": origin.url}, transport=transport) as mount:

        def count(operation: str) -> float:
            return mount.metric("modelfs_fuse_requests_total", operation=operation)

        names = ("lookup", "open", "read", "release", "getxattr")
        before = {name: count(name) for name in names}
        mount.python(OPENS, "7", str(mount.path / "m/tiny.json"))
        eventually(lambda: count("release") - before["release"] == 7)
        assert count("open") - before["open"] == 7
        assert count("read") == before["read"]
        mount.python(
            "import os,sys; os.getxattr(sys.argv[1], 'user.modelfs.source')", str(mount.path / "m/w.bin")
        )
        assert count("getxattr") - before["getxattr"] == 1
        assert count("lookup") > before["lookup"]


FOREIGN = """
import fcntl, os, select, sys
FS_IOC_GETFLAGS = 0x80086601
fd = os.open(sys.argv[1], os.O_RDONLY)
try:
    fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(8))
except OSError as error:
    print(error.errno)
poll = select.poll()
poll.register(fd)
print(poll.poll(0)[0][1] & select.POLLIN)
print(len(os.read(fd, 1 << 20)))
"""


def test_requests_of_no_meaning_are_refused_as_not_implemented(mount: Mounted) -> None:
    others = mount.metric("modelfs_fuse_requests_total", operation="other")
    said = mount.python(FOREIGN, str(mount.path / "m/tiny.json")).split()
    # The kernel makes ENOTTY of ENOSYS here, and answers polls itself from then on.
    assert said == [str(errno.ENOTTY), str(select.POLLIN), "2"]
    assert mount.metric("modelfs_fuse_requests_total", operation="other") >= others + 2


# -- the loop ------------------------------------------------------------------------------------------


def long_turns(mount: Mounted) -> float:
    """Return how often the daemon's loop has computed for more than 20 ms without looking at its events."""
    found = mount.samples("modelfs_loop_lag_seconds_bucket", clock="cpu")
    below = {sample.labels["le"]: sample.value for sample in found}
    return below["+Inf"] - below["0.02"]


READ_TWICE = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
for _ in range(2):
    os.lseek(fd, 0, 0)
    while os.read(fd, 1 << 20):
        pass
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
"""


def test_nothing_keeps_the_loop_for_20_ms(place: Path, transport: str) -> None:
    many = {f"many/{number}.json": b"{}" for number in range(10_000)}
    with (
        Origin({"w.bin": noise(MIB) * 256, **many}) as origin,
        mounted(place, sources={"m": origin.url}, transport=transport) as mount,
    ):
        before = long_turns(mount)
        mount.python(READ_TWICE, str(mount.path / "m/w.bin"))
        assert long_turns(mount) == before, "a large file, cold and warm"
        found = mount.run("ls", "-l", str(mount.path / "m/many")).stdout
        assert len(found.splitlines()) == 10_001
        assert long_turns(mount) == before, "a listing"
