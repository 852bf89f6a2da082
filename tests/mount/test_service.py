"""As a service: the manager is told how we are, and keeps the mount over a restart of the service."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from modelfs.fuse import mountpoint
from tests.mount.harness import Mounted, alone, eventually, left_behind, mounted
from tests.mount.test_handover import BLOCK, Readers, noise, sha256
from tests.origin import Origin

NAMES = {"modelfs-device", "modelfs-ledger"}

EXEC = """
import fcntl, os, sys
fds = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 50) for fd in sys.argv[1].split(',') if fd]
for number, fd in enumerate(fds, 3):
    os.dup2(fd, number)
    os.close(fd)
os.environ['SYSTEMD_EXEC_PID'] = str(os.getpid())
if fds:
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)))
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Starts a program as a service manager does: with descriptors from 3 on, addressed to its process."""


class Manager:
    """What a service manager does for one service with ``FileDescriptorStoreMax=`` and ``Type=notify``."""

    def __init__(self, place: Path, *words: str, keeping: bool = True) -> None:
        self.said: list[str] = []
        self.kept: dict[str, int] = {}
        self._words = [sys.executable, "-m", "modelfs", *words]
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(place / "notify"))
        self._env = {**os.environ, **alone(place), "NOTIFY_SOCKET": str(place / "notify")}
        if keeping:
            self._env["FDSTORE"] = "8"
        self._log = (place / "service.log").open("ab")
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            message, fds, _, _ = socket.recv_fds(self._socket, 65536, 8)
            if message == b"end":
                return
            said = dict(line.split("=", 1) for line in message.decode().splitlines())
            for fd in fds:
                if said.get("FDSTORE") == "1" and said["FDNAME"] not in self.kept:
                    self.kept[said["FDNAME"]] = fd
                else:  # one that is the same as another is not kept twice
                    os.close(fd)
            if "FDSTOREREMOVE" in said:
                os.close(self.kept.pop(said["FDNAME"]))
            self.said += message.decode().splitlines()

    def start(self) -> subprocess.Popen[bytes]:
        """Start the service; returns when it has said that it is ready."""
        process = self.begin()
        eventually(lambda: "READY=1" in self.said or process.poll() is not None, 60)
        assert process.poll() is None, Path(self._log.name).read_text()
        return process

    def begin(self) -> subprocess.Popen[bytes]:
        """Start the service."""
        self.said.clear()
        fds = ",".join(map(str, self.kept.values()))
        return subprocess.Popen(
            [sys.executable, "-c", EXEC, fds, *self._words],
            env={**self._env, "LISTEN_FDNAMES": ":".join(self.kept)},
            pass_fds=list(self.kept.values()),
            stdout=self._log,
            stderr=self._log,
        )

    def forget(self) -> None:
        """Close what was kept, as when a service is stopped: the kernel ends a mount that nobody serves."""
        while self.kept:
            os.close(self.kept.popitem()[1])

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.sendto(b"end", self._socket.getsockname())
        self._thread.join()
        self._socket.close()
        self._log.close()
        self.forget()


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin({"small.json": b'{"a": 1}', "w.bin": noise(3 * BLOCK + 77), "x.dat": noise(BLOCK, 2)}) as own:
        yield own


@contextmanager
def managed(
    place: Path, url: str, *, keeping: bool = True, transport: str = "kernel"
) -> Iterator[tuple[Manager, Mounted]]:
    path = place / "models"
    path.mkdir()
    words = ["mount", str(path), "--foreground", f"--transport={transport}", f"--cache-dir={place}/cache"]
    manager = Manager(place, *words, f"--source=m={url}", "--refresh=0", keeping=keeping)
    try:
        yield manager, Mounted(path, place / "cache", place / "service.log", alone(place))
    finally:
        manager.close()
        while mountpoint.mount_at(path) is not None:
            mountpoint.detach(path, lazy=True)
        eventually(lambda: left_behind(place) == [])


def test_a_restart_of_the_service_keeps_the_mount_and_fails_no_read(place: Path, origin: Origin) -> None:
    with managed(place, origin.url) as (manager, mount):
        service = manager.start()
        assert manager.kept.keys() == NAMES
        device = mountpoint.mount_at(mount.path)
        with Readers(mount.path / "m", origin, 4) as results:
            service.terminate()
            assert service.wait(30) == 0
            assert "STOPPING=1" in manager.said
            assert mountpoint.mount_at(mount.path) == device
            service = manager.start()
            assert mount.status()["holder_pid"] == service.pid
            assert mount.status()["handovers"] == 1
            # And if holder and daemon are killed at once, nothing is lost either.
            for pid in (service.pid, mount.status()["pid"]):
                os.kill(pid, signal.SIGKILL)
            service.wait(30)
            service = manager.start()
            assert mount.status()["handovers"] == 2
        assert len(results) == 4
        assert all(results)
        assert mountpoint.mount_at(mount.path) == device
        assert manager.kept.keys() == NAMES
        mount.umount()
        assert service.wait(30) == 0


def test_what_was_kept_of_a_mount_that_is_gone_is_dropped(place: Path, origin: Origin) -> None:
    with managed(place, origin.url) as (manager, mount):
        service = manager.start()
        mount.umount()
        assert service.wait(30) == 0
        service = manager.start()  # with the descriptors of the mount that is gone
        assert manager.said.count("FDSTOREREMOVE=1") == 2
        assert manager.kept.keys() == NAMES
        assert sha256((mount.path / "m/x.dat").read_bytes()) == sha256(origin.files["x.dat"])
        assert mount.status()["handovers"] == 0
        mount.umount()
        assert service.wait(30) == 0


def test_without_a_store_of_descriptors_a_stop_unmounts(place: Path, origin: Origin) -> None:
    with managed(place, origin.url, keeping=False) as (manager, mount):
        service = manager.start()
        assert manager.kept == {}
        os.kill(mount.status()["pid"], signal.SIGKILL)  # the holder is there all the same
        eventually(lambda: sum(line.startswith("STATUS=") for line in manager.said) == 2)
        assert mount.status()["handovers"] == 1
        service.terminate()
        assert service.wait(30) == 0
        assert mountpoint.mount_at(mount.path) is None


def test_a_stop_ends_a_service_that_waits_for_a_store(place: Path) -> None:
    silent = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
    with silent, managed(place, url) as (manager, mount):
        service = manager.begin()
        with silent.accept()[0]:
            service.terminate()
            assert service.wait(30) != 0
        assert mountpoint.mount_at(mount.path) is None


def test_pyfuse3_says_that_it_is_ready_and_a_stop_unmounts(place: Path, origin: Origin) -> None:
    with managed(place, origin.url, transport="pyfuse3") as (manager, mount):
        service = manager.start()
        assert manager.kept == {}
        assert mount.status()["transport"]["name"] == "pyfuse3"
        service.terminate()
        assert service.wait(30) == 0
        assert mountpoint.mount_at(mount.path) is None


def test_what_a_stopped_service_leaves_can_be_unmounted(place: Path, origin: Origin) -> None:
    with managed(place, origin.url) as (manager, mount):
        service = manager.start()
        service.terminate()
        assert service.wait(30) == 0
        manager.forget()
        said = mount.cli("umount", str(mount.path)).stdout
        assert said == f"removed the mount that a daemon left behind on {mount.path}\n"


def test_what_nobody_serves_for_now_can_be_unmounted(place: Path, origin: Origin) -> None:
    with managed(place, origin.url) as (manager, mount):
        for _ in range(2):  # after a hand-over the kernel knows no attributes of the root
            service = manager.start()
            service.terminate()
            assert service.wait(30) == 0
        assert mount.cli("umount", "--lazy", str(mount.path)).stdout == f"unmounted {mount.path}\n"


def test_a_mount_in_the_background_is_none_of_the_managers_business(place: Path, origin: Origin) -> None:
    path = place / "models"
    path.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(place / "notify"))
        manager.setblocking(False)
        told = {"NOTIFY_SOCKET": str(place / "notify"), "FDSTORE": "8"}
        with mounted(
            place, sources={"m": origin.url}, env={**alone(place), **told}, transport="kernel"
        ) as mount:
            os.kill(mount.status()["holder_pid"], signal.SIGTERM)
            eventually(lambda: left_behind(place) == [])  # not even the mount
        with pytest.raises(BlockingIOError):
            manager.recv(100)
