"""A mount outlives its daemon: killed or upgraded at any moment, no reader sees more than a pause."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modelfs.fuse import mountpoint
from modelfs.testing.s3 import S3Server
from tests.mount.harness import Mounted, Reader, alone, eventually, mounted
from tests.origin import Origin

MIB = 1 << 20
BLOCK = 8 * MIB


def noise(size: int, seed: int = 1) -> bytes:
    source = random.Random(seed)
    return b"".join(source.randbytes(min(MIB, size - start)) for start in range(0, size, MIB))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin(
        {"small.json": b'{"a": 1}', "w.bin": noise(6 * BLOCK + 77), "x.dat": noise(2 * BLOCK)}
    ) as own:
        yield own


@pytest.fixture
def mount(place: Path, origin: Origin) -> Iterator[Mounted]:
    with mounted(
        place, "--refresh", "0", sources={"m": origin.url}, env=alone(place), transport="kernel"
    ) as own:
        own.allowed_errors.append("the next one takes the mount over")
        yield own


def kill(mount: Mounted, *, wait: bool = True) -> None:
    """Kill the daemon with SIGKILL, and wait until its successor answers."""
    while not _answers(mount, 0):
        """The one before may still be taking over."""
    status = mount.status()
    os.kill(status["pid"], signal.SIGKILL)
    while wait and not _answers(mount, status["handovers"] + 1):
        """The successor is on its way."""


def _answers(mount: Mounted, handovers: int) -> bool:
    result = mount.cli("status", str(mount.path), "--json", check=False)
    return result.returncode == 0 and mount.status()["handovers"] >= handovers


READ_LATER = "fd=os.open(sys.argv[1],os.O_RDONLY)\nstep()\nprint(os.read(fd,1000).decode(),flush=True)\n"
"""Code for a `Reader`: opens a small file, and reads it when it is told to go on."""


def test_a_read_in_progress_is_finished_by_the_successor(mount: Mounted, origin: Origin) -> None:
    origin.held["x.dat"] = (MIB, threading.Event())
    code = "fd=os.open(sys.argv[1],os.O_RDONLY)\nprint(os.pread(fd,1000,5<<20).hex(),flush=True)\n"
    with Reader(code, mount.path / "m/x.dat") as reader:
        while not any(path == "x.dat" for _, path, _ in origin.contents()):
            """The reader waits for bytes that the origin holds back."""
        kill(mount)
        origin.held["x.dat"][1].set()
        assert reader.said() == origin.files["x.dat"][5 * MIB : 5 * MIB + 1000].hex()
        assert reader.process.wait(60) == 0
    assert mount.status()["handovers"] == 1


def test_open_files_of_every_kind_stay_good(mount: Mounted, origin: Origin) -> None:
    code = (
        "big, small = sys.argv[1:]\n"
        "fd=os.open(big,os.O_RDONLY)\n"
        "m=mmap.mmap(fd,0,prot=mmap.PROT_READ)\n"
        "sd=os.open(small,os.O_RDONLY)\n"
        "step(os.pread(fd,10,0).hex())\n"
        "step(os.pread(fd,10,20<<20).hex()+m[40<<20:(40<<20)+10].hex()+os.read(sd,100).hex())\n"
        "os.posix_fadvise(fd,0,0,os.POSIX_FADV_DONTNEED)\n"
        "print(__import__('hashlib').sha256(m).hexdigest(),flush=True)\n"
    )
    big, small = origin.files["w.bin"], origin.files["small.json"]
    with Reader(code, mount.path / "m/w.bin", mount.path / "m/small.json") as reader:
        assert reader.said() == big[:10].hex()
        kill(mount)
        reader.go_on()
        assert reader.said() == (big[20 * MIB :][:10] + big[40 * MIB :][:10] + small).hex()
        kill(mount)
        reader.go_on()
        assert reader.said() == sha256(big)
    # All of it is there now: the kernel reads it by itself, also while there is no daemon.
    code = (
        "fd=os.open(sys.argv[1],os.O_RDONLY)\n"
        "step()\n"
        "print(__import__('hashlib').file_digest(open(fd,'rb'),'sha256').hexdigest(),flush=True)\n"
        "step()\n"
    )
    with Reader(code, mount.path / "m/w.bin") as first:
        first.said()
        kill(mount)
        with Reader(code, mount.path / "m/w.bin") as second:  # a new open beside one from before
            second.said()
            for reader in (first, second):
                reader.go_on()
                assert reader.said() == sha256(big)
            assert second.end() == 0
        kill(mount)
        assert first.end() == 0
    assert mount.python(
        "print(len(open(sys.argv[1],'rb').read()))".join(("import sys\n", "")), f"{mount.path}/m/w.bin"
    )


def test_a_passthrough_reader_needs_no_daemon(mount: Mounted, origin: Origin) -> None:
    status = mount.status()
    with Reader(READ_LATER + "os.close(fd)\nstep()\n", mount.path / "m/small.json") as reader:
        reader.said()
        os.kill(status["holder_pid"], signal.SIGSTOP)  # nobody starts the next one meanwhile
        try:
            os.kill(status["pid"], signal.SIGKILL)
            reader.go_on()
            assert reader.said() == origin.files["small.json"].decode()
            assert reader.said() == ""  # closing does not wait for anybody either
        finally:
            os.kill(status["holder_pid"], signal.SIGCONT)
    while not _answers(mount, 1):
        """The successor is on its way."""


def test_a_listing_goes_on(place: Path) -> None:
    names = [f"{number:05d}.json" for number in range(5000)]
    with (
        Origin(dict.fromkeys(names, b"{}")) as origin,
        mounted(place, "--refresh", "0", sources={"m": origin.url}, transport="kernel") as mount,
    ):
        mount.allowed_errors.append("the next one takes the mount over")
        code = (
            "with os.scandir(sys.argv[1]) as found:\n"
            "    names=[next(found).name]\n"
            "    step()\n"
            "    names+=[entry.name for entry in found]\n"
            "print(len(names), len(set(names)), flush=True)\n"
        )
        with Reader(code, mount.path / "m") as reader:
            reader.said()
            kill(mount)
            reader.go_on()
            assert reader.said() == "5000 5000"


def test_old_versions_that_are_open_stay_good(mount: Mounted, origin: Origin) -> None:
    old, new = origin.files["x.dat"], noise(2 * BLOCK, 9)
    code = (
        "data=open(sys.argv[1],'rb').read()\n"
        "fd=os.open(sys.argv[1],os.O_RDONLY)\n"
        "step()\n"
        "os.posix_fadvise(fd,0,0,os.POSIX_FADV_DONTNEED)\n"
        "print(os.pread(fd,10,9<<20).hex(), flush=True)\n"
    )
    with Reader(code, mount.path / "m/x.dat") as reader:
        reader.said()
        origin.files["x.dat"] = new
        mount.cli("refresh", str(mount.path))
        kill(mount)
        reader.go_on()
        assert reader.said() == old[9 * MIB : 9 * MIB + 10].hex()
    assert (mount.path / "m/x.dat").read_bytes() == new


def test_models_found_on_demand_stay(place: Path) -> None:
    with S3Server() as server:
        server.client().create_bucket(Bucket="models")
        server.client().put_object(Bucket="models", Key="bert/config.json", Body=b"{}")
        (place / "empty.yaml").write_text("{}\n")
        env = {**server.env(), "MODELFS_CONFIG": str(place / "none.yaml")}
        (place / "none.yaml").write_text("namespaces: [s3]\n")
        with mounted(place, env=env, transport="kernel") as mount:
            mount.allowed_errors.append("the next one takes the mount over")
            path = mount.path / "s3/models/bert/config.json"
            with Reader(READ_LATER, path) as reader:
                reader.said()
                kill(mount)
                reader.go_on()
                assert reader.said() == "{}"
            assert path.read_bytes() == b"{}"


def test_an_upgrade_under_load_fails_no_read(mount: Mounted, origin: Origin) -> None:
    with Readers(mount.path / "m", origin, 4) as results:
        for number in range(1, 3):
            old = mount.status()["pid"]
            said = mount.cli("upgrade", str(mount.path)).stdout
            status = mount.status()
            assert status["pid"] != old
            assert status["handovers"] == number
            assert f"(pid {status['pid']})" in said
    assert all(results), results


def test_a_daemon_that_dies_while_its_own_mount_is_asked_has_a_successor(place: Path, origin: Origin) -> None:
    root = str(Path(__file__).parents[2])
    (place / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if '--ledger-fd' in sys.orig_argv:\n"
        "    from modelfs.fuse.operations import Operations\n"
        "    answer = Operations.statfs\n"
        "    def die_once(self):\n"
        f"        if not os.path.exists({str(place / 'died')!r}):\n"
        f"            open({str(place / 'died')!r}, 'w').close()\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return answer(self)\n"
        "    Operations.statfs = die_once\n"
    )
    env = {**alone(place), "PYTHONPATH": os.pathsep.join([str(place), root])}
    with mounted(place, sources={"m": origin.url}, transport="kernel", env=env) as mount:
        mount.allowed_errors.append("the next one takes the mount over")
        os.kill(mount.status()["pid"], signal.SIGKILL)  # the next one is asked whether it answers, and dies
        eventually((place / "died").exists)
        assert mount.run("stat", str(mount.path / "m")).returncode == 0
        eventually(lambda: _answers(mount, 2))


def test_kills_under_load_fail_no_read(mount: Mounted, origin: Origin) -> None:
    chance = random.Random(4)
    with Readers(mount.path / "m", origin, 4) as results:
        for _ in range(3):
            time.sleep(chance.uniform(2.5, 4))  # a moment nobody chose; quicker deaths are a crash loop
            kill(mount, wait=False)
    assert len(results) == 4
    assert all(results), results
    while not _answers(mount, 3):
        """The last successor is on its way."""


class Readers:
    """Processes that read the files again and again and compare; yields how often each did, in the end."""

    CODE = (
        "import hashlib,json,select,random\n"
        "expected=json.loads(sys.argv[2]); rounds=0\n"
        "def mapped(p):\n"
        "    with open(p,'rb') as f, mmap.mmap(f.fileno(),0,prot=mmap.PROT_READ) as m:\n"
        "        return hashlib.sha256(m)\n"
        "def cold(p):\n"
        "    with open(p,'rb') as f:\n"
        "        os.posix_fadvise(f.fileno(),0,0,os.POSIX_FADV_DONTNEED)\n"
        "        return hashlib.file_digest(f,'sha256')\n"
        "while not select.select([sys.stdin],[],[],0)[0]:\n"
        "    assert sorted(os.listdir(sys.argv[1])) == sorted(expected)\n"
        "    name=random.choice(list(expected)); way=random.choice([mapped,cold])\n"
        "    assert way(os.path.join(sys.argv[1],name)).hexdigest()==expected[name], name\n"
        "    rounds+=1\n"
        "print(rounds,flush=True)\n"
    )

    def __init__(
        self, model: Path, origin: Origin, count: int, *, start: Callable[..., Reader] = Reader
    ) -> None:
        expected = json.dumps({name: sha256(data) for name, data in origin.files.items()})
        self.all = [start(self.CODE, model, expected) for _ in range(count)]
        self.results: list[int] = []

    def __enter__(self) -> list[int]:
        return self.results

    def __exit__(self, kind: object, *error: object) -> None:
        try:
            for reader in self.all:
                reader.go_on()
            for reader in self.all:
                self.results.append(int(reader.said() or 0))
                assert reader.process.wait(60) == 0
        finally:
            for reader in self.all:
                reader.__exit__()


def test_the_daemon_goes_on_without_its_holder(mount: Mounted, origin: Origin) -> None:
    status = mount.status()
    os.kill(status["holder_pid"], signal.SIGKILL)
    assert sha256((mount.path / "m/x.dat").read_bytes()) == sha256(origin.files["x.dat"])
    assert mount.status()["pid"] == status["pid"]


def test_the_holder_unmounts_when_it_is_told_to_end(mount: Mounted) -> None:
    status = mount.status()
    ended = [os.pidfd_open(status[name]) for name in ("pid", "holder_pid")]
    os.kill(status["holder_pid"], signal.SIGTERM)
    for process in ended:
        assert _readable(process)
        os.close(process)
    assert mountpoint.mount_at(mount.path) is None


def _readable(fd: int) -> bool:
    import select

    return bool(select.select([fd], [], [], 30)[0])


def test_in_a_crash_loop_readers_get_an_error_instead_of_waiting(mount: Mounted, origin: Origin) -> None:
    mount.allowed_errors += ["daemons died one after the other", "is in use by process"]
    status = mount.status()
    # Somebody else takes the cache: no successor can begin.
    lock = (
        "import fcntl,os\nfd=os.open(sys.argv[1]+'/lock',os.O_RDWR)\nstep()\n"
        "fcntl.flock(fd,fcntl.LOCK_EX)\nstep('taken')\n"
    )
    with Reader(lock, mount.cache) as thief:
        thief.said()
        thief.go_on()
        os.kill(status["holder_pid"], signal.SIGSTOP)
        os.kill(status["pid"], signal.SIGKILL)
        assert thief.said() == "taken"
        os.kill(status["holder_pid"], signal.SIGCONT)
        code = (
            "try: print(os.listdir(sys.argv[1]),flush=True)\nexcept OSError as e: print(e.errno,flush=True)\n"
        )
        with Reader(code, mount.path / "m") as reader:
            assert reader.said() == str(errno.EIO)
        for words in (["status", str(mount.path)], ["status"], ["status", "--json"]):
            told = mount.cli(*words, check=False)
            assert told.returncode == 4
            assert re.fullmatch(
                rf"modelfs: {mount.path}: refuses every read since [\d:]+, after 5 quick deaths of "
                r"its daemon, the last with exit code 1; the next one is started at [\d:]+: see its log\n",
                told.stderr,
            )
    log = mount.log.read_text()
    assert "readers get EIO" in log
    os.kill(status["holder_pid"], signal.SIGTERM)
    while mountpoint.mount_at(mount.path) is not None:
        """The holder unmounts by itself."""
