"""Faults of the node: the cache disk, descriptors, memory, crowds and a daemon that stands still."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelfs.fuse import mountpoint
from tests.mount.harness import Mounted, alone, eventually, file_system, left_behind, mounted
from tests.origin import Origin

MIB = 1 << 20
BLOCK = 8 * MIB
MEMORY = Path("/sys/fs/cgroup/memory")


def noise(size: int, seed: int) -> bytes:
    source = random.Random(seed)
    return b"".join(source.randbytes(min(MIB, size - start)) for start in range(0, size, MIB))


FILES = {
    "a.bin": noise(2 * BLOCK + 5, 1),
    "b.bin": noise(BLOCK + 9, 2),
    "c.dat": noise(BLOCK, 3),
    "config.json": b'{"small": true}',
}
SUMS = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin(FILES) as own:
        yield own


READ = """
import errno, hashlib, json, os, sys
found = {}
for name in json.loads(sys.argv[2]):
    try:
        with open(os.path.join(sys.argv[1], name), 'rb') as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            found[name] = hashlib.file_digest(file, 'sha256').hexdigest()
    except OSError as error:
        found[name] = errno.errorcode[error.errno]
print(json.dumps(found))
"""
"""Prints the digests of files, or the errors that they gave."""


def read(mount: Mounted, *names: str, model: str = "m") -> dict[str, str]:
    found: dict[str, str] = json.loads(mount.python(READ, str(mount.path / model), json.dumps(names)))
    return found


def all_good(mount: Mounted) -> bool:
    return read(mount, *SUMS) == SUMS


# -- the cache disk


def test_a_full_cache_disk_streams(place: Path, transport: str, origin: Origin) -> None:
    with (
        file_system(place, "-t", "tmpfs", "-o", "size=20m", "modelfs-test") as disk,
        mounted(
            place,
            sources={"m": origin.url},
            env=alone(place),
            transport=transport,
            cache=disk / "cache",
        ) as mount,
    ):
        assert all_good(mount)  # 32 MiB of files
        with (disk / "filler").open("wb") as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(65536))
                filler.flush()
        assert os.statvfs(disk).f_bavail == 0
        assert all_good(mount)
        mount.drop_pages()
        assert all_good(mount)


def test_a_cache_disk_that_turns_read_only_serves_on(place: Path, origin: Origin) -> None:
    image = place / "image"
    with image.open("wb") as file:
        file.truncate(96 * MIB)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    with (
        file_system(place, "-o", "loop,errors=remount-ro", str(image)) as disk,
        mounted(
            place,
            sources={"m": origin.url},
            env=alone(place),
            transport="kernel",
            cache=disk / "cache",
        ) as mount,
    ):
        assert read(mount, "a.bin") == {"a.bin": SUMS["a.bin"]}
        (device,) = (line.split()[0] for line in _mount_table() if line.split()[1] == str(disk))
        (Path("/sys/fs/ext4") / Path(device).name / "trigger_fs_error").write_text("1")
        with pytest.raises(OSError, match="Read-only"):
            (disk / "probe").touch()
        assert all_good(mount)
        mount.drop_pages()
        assert all_good(mount)


def _mount_table() -> list[str]:
    return Path("/proc/self/mounts").read_text().splitlines()


def test_a_cache_that_is_deleted_under_the_daemon_costs_no_read(place: Path, origin: Origin) -> None:
    with mounted(place, sources={"m": origin.url}, env=alone(place), transport="kernel") as mount:
        assert read(mount, "a.bin") == {"a.bin": SUMS["a.bin"]}
        shutil.rmtree(mount.cache)
        assert all_good(mount)
        mount.drop_pages()
        assert all_good(mount)
        mount.allowed_errors.append("the next one takes the mount over")
        kill(mount)
        assert all_good(mount)


def kill(mount: Mounted) -> None:
    """Kill the daemon and wait for its successor."""
    status = mount.status()
    os.kill(status["pid"], signal.SIGKILL)
    eventually(lambda: serving(mount) > status["handovers"], 60)


def serving(mount: Mounted) -> int:
    """Return how often the mount was taken over; -1 while nobody answers."""
    result = mount.cli("status", str(mount.path), "--json", check=False)
    return int(json.loads(result.stdout)["handovers"]) if result.returncode == 0 else -1


def test_what_a_power_failure_left_half_written_is_never_served(place: Path, origin: Origin) -> None:
    options = {"sources": {"m": origin.url}, "env": alone(place), "transport": "kernel"}
    with mounted(place, **options) as mount:  # type: ignore[arg-type]
        assert all_good(mount)
        status = mount.status()
        for pid in filter(None, (status["holder_pid"], status["pid"])):
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: left_behind(place) == [str(mount.path)])
        mountpoint.detach(mount.path, lazy=True)
    objects = mount.cache / "objects"
    by_size = {path.stat().st_size: path for path in objects.rglob("*.data")}
    data = {name: by_size[len(FILES[name])] for name in FILES}
    for path in data.values():
        path.chmod(0o600)
    with data["a.bin"].open("r+b") as file:  # a block that never reached the disk
        file.seek(BLOCK)
        file.write(bytes(4096))
    os.truncate(data["b.bin"], BLOCK)  # a size that was not written
    table = data["c.dat"].with_suffix(".table")
    table.write_bytes(table.read_bytes()[:-3] + b"\xff\xff\xff")
    data["config.json"].with_suffix(".table").write_bytes(b"")
    (mount.cache / "clean.new").write_bytes(b"half")
    database = mount.cache / "meta" / "cache.db"
    database.write_bytes(database.read_bytes()[:5000])
    (mount.cache / "session").write_text("another boot of this machine\n")
    with mounted(place, **options) as mount:  # type: ignore[arg-type]
        assert mount.status()["cache"]["unclean_start"]
        assert all_good(mount)
        assert all_good(mount)
        assert mount.fetched() < sum(map(len, FILES.values()))  # what is whole is not fetched again


# -- limits of the process


def test_a_daemon_without_descriptors_delays_and_breaks_nothing(place: Path, transport: str) -> None:
    names = [f"{number:03d}.json" for number in range(60)]
    files = {name: name.encode() * 100 for name in names}
    with (
        Origin(files) as origin,
        mounted(place, sources={"m": origin.url}, env=alone(place), transport=transport) as mount,
    ):
        mount.allowed_errors.append("Too many open files")
        pid = mount.status()["pid"]
        used = len(os.listdir(f"/proc/{pid}/fd"))
        _, most = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 4, most))
        code = (
            "import concurrent.futures, json, os, sys\n"
            "held = []\n"
            "def read(name):\n"
            "    try:\n"
            "        file = open(os.path.join(sys.argv[1], name), 'rb')\n"
            "        held.append(file)\n"
            "        return file.read().decode()\n"
            "    except OSError as error:\n"
            "        return error.errno\n"
            "with concurrent.futures.ThreadPoolExecutor(64) as pool:\n"
            "    names = json.loads(sys.argv[2])\n"
            "    print(json.dumps(dict(zip(names, pool.map(read, names)))))\n"
        )
        words = [sys.executable, "-c", code, str(mount.path / "m"), json.dumps(names)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as reader:
            eventually(lambda: "Too many open files" in mount.log.read_text())
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, most))
            found = json.loads(reader.communicate(timeout=120)[0])
        clean = {errno.EIO, errno.EMFILE, errno.ENFILE}
        wrong = {n: got for n, got in found.items() if got not in clean and got != files[n].decode()}
        assert wrong == {}
        again = read(mount, *names)
        assert again == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        assert mount.status()["pid"] == pid


@pytest.fixture
def small_memory() -> Iterator[Path]:
    """A memory cgroup (version 1) of 256 MiB."""
    group = MEMORY / f"modelfs-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(256 * MIB))
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    yield group
    eventually(lambda: (group / "cgroup.procs").read_text() == "")
    group.rmdir()


def test_256_mib_of_memory_are_enough(place: Path, small_memory: Path) -> None:
    files = {f"{number}.bin": noise(5 * BLOCK, number) for number in range(8)}
    with (
        Origin(files) as origin,
        mounted(place, sources={"m": origin.url}, env=alone(place), transport="kernel") as mount,
    ):
        pid = mount.status()["pid"]
        (small_memory / "cgroup.procs").write_text(str(pid))
        expected = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        words = [sys.executable, "-c", READ, str(mount.path / "m")]
        readers = [
            subprocess.Popen([*words, json.dumps([*files][n:] + [*files][:n])], stdout=subprocess.PIPE)
            for n in range(8)
        ]
        for reader in readers:
            assert json.loads(reader.communicate(timeout=120)[0]) == expected
        assert mount.status()["pid"] == pid


# -- crowds


def test_10_000_open_handles(place: Path, transport: str, origin: Origin) -> None:
    code = (
        "import os, sys\n"
        "names = sys.argv[2:]\n"
        "paths = [os.path.join(sys.argv[1], name) for name in names] * 2500\n"
        "fds = [os.open(path, os.O_RDONLY) for path in paths]\n"
        "print('open', flush=True)\n"
        "sys.stdin.readline()\n"
        "print(len({(n % len(names), os.pread(fd, 10, 5)) for n, fd in enumerate(fds)}), flush=True)\n"
    )
    with mounted(place, sources={"m": origin.url}, env=alone(place), transport=transport) as mount:
        assert all_good(mount)
        words = [sys.executable, "-c", code, str(mount.path / "m"), *FILES]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "open\n"
            assert mount.status()["open_handles"] == 10_000
            if transport == "kernel":
                mount.allowed_errors.append("the next one takes the mount over")
                kill(mount)
                assert mount.status()["open_handles"] == 10_000
            assert reader.communicate("\n", timeout=120)[0] == f"{len(FILES)}\n"
        eventually(lambda: mount.status()["open_handles"] == 0)


def test_1_000_readers_at_once(place: Path, transport: str, origin: Origin) -> None:
    code = (
        "import hashlib, os, sys, threading\n"
        "path, size, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])\n"
        "found = []\n"
        "def read(number):\n"
        "    fd = os.open(path, os.O_RDONLY)\n"
        "    start = (seed * 100 + number) * 16411 % size\n"
        "    found.append((start, os.pread(fd, 5000, start)))\n"
        "    os.close(fd)\n"
        "threads = [threading.Thread(target=read, args=[n]) for n in range(100)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "original = open(sys.argv[4], 'rb').read()\n"
        "print(sum(data == original[start : start + 5000] for start, data in found))\n"
    )
    (place / "original").write_bytes(FILES["a.bin"])
    with mounted(place, sources={"m": origin.url}, env=alone(place), transport=transport) as mount:
        words = [sys.executable, "-c", code, str(mount.path / "m/a.bin"), str(len(FILES["a.bin"]))]
        readers = [
            subprocess.Popen([*words, str(seed), str(place / "original")], stdout=subprocess.PIPE, text=True)
            for seed in range(10)
        ]
        assert [reader.communicate(timeout=120)[0] for reader in readers] == ["100\n"] * 10


def test_a_daemon_that_stood_still_goes_on(place: Path, origin: Origin) -> None:
    with mounted(place, sources={"m": origin.url}, env=alone(place), transport="kernel") as mount:
        pid = mount.status()["pid"]
        words = [sys.executable, "-c", READ, str(mount.path / "m"), json.dumps([*SUMS])]
        os.kill(pid, signal.SIGSTOP)
        try:
            readers = [subprocess.Popen(words, stdout=subprocess.PIPE) for _ in range(4)]
            with pytest.raises(subprocess.TimeoutExpired):
                readers[0].wait(3)
        finally:
            os.kill(pid, signal.SIGCONT)
        for reader in readers:
            assert json.loads(reader.communicate(timeout=120)[0]) == SUMS
        assert mount.status()["pid"] == pid
