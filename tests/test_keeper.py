"""The keeper: gives what it was given to the next who asks, and keeps nothing that is dead."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelfs import service
from tests.mount.harness import eventually

KEEPER = [sys.executable, "-m", "modelfs.keeper"]


class Keeper:
    """A process that keeps what belongs to a mount that does not exist."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.log = place / "log"
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            words = [*KEEPER, "keep", str(self.place), str(self.place / "models")]
            self.process = subprocess.Popen(words, stderr=log)
        count = self.log.read_text().count("keeping what")
        eventually(lambda: self.log.read_text().count("keeping what") > count)

    def run(self, script: str) -> str:
        """Return what a shell prints that was started with what is kept."""
        words = [*KEEPER, "run", str(self.place), "sh", "-euc", script]
        return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout.strip()

    def end(self) -> int:
        self.process.terminate()
        return self.process.wait(30)


@pytest.fixture
def keeper(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Keeper]:
    monkeypatch.setenv("NOTIFY_SOCKET", str(place / "notify"))
    monkeypatch.setenv("SYSTEMD_EXEC_PID", str(os.getpid()))
    own = Keeper(place)
    yield own
    own.process.kill()
    own.process.wait()


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("k")  # a short path: it becomes one of a socket


def file(text: str) -> int:
    """Return a descriptor of a memory file that holds `text`."""
    fd = os.memfd_create("test")
    os.write(fd, text.encode())
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def keep(name: str, fd: int) -> None:
    service.keep(name, fd)
    os.close(fd)


def test_a_command_is_started_as_a_service_manager_does(keeper: Keeper) -> None:
    keep("a", file("one"))
    keep("b", file("two"))
    said = keeper.run('echo $LISTEN_FDNAMES $LISTEN_FDS $(cat <&3) $(cat <&4); test "$LISTEN_PID" = $$')
    assert said == "a:b 2 one two"
    assert keeper.run("echo $NOTIFY_SOCKET; test $FDSTORE -ge 2") == str(keeper.place / "notify")
    assert keeper.run("echo $LISTEN_FDS") == "2"  # they stay


def test_a_name_has_the_last_descriptor_and_can_be_dropped(keeper: Keeper) -> None:
    keep("a", file("old"))
    keep("a", file("new"))
    assert keeper.run("echo $LISTEN_FDS; cat <&3") == "1\nnew"
    service.tell("FDSTOREREMOVE=1", "FDNAME=a")
    assert keeper.run("echo $LISTEN_FDS") == "0"


def test_no_more_is_kept_than_a_mount_can_have(keeper: Keeper) -> None:
    for number in range(20):
        keep(f"n{number}", file(str(number)))
    assert keeper.run("echo $LISTEN_FDS") == "16"
    keep("n3", file("again"))
    assert keeper.run("echo $LISTEN_FDS; cat /proc/self/fd/18") == "16\nagain"


def test_nothing_is_kept_of_a_conversation_that_has_ended(keeper: Keeper) -> None:
    keep("ledger", file("of the device"))
    here, there = os.pipe()
    service.keep("device", there)
    assert keeper.run("echo $LISTEN_FDS") == "2"
    os.close(here)  # now the other end has an error, as /dev/fuse has after an unmount
    eventually(lambda: keeper.run("echo $LISTEN_FDS") == "0")
    os.close(there)


def test_what_makes_no_sense_is_ignored(keeper: Keeper) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(str(keeper.place / "notify"))
        for message in (b"", b"\xff\xfe=\n==\nFDSTORE", b"FDSTORE=1", b"FDSTORE=1\nFDNAME=none", b"x" * 9000):
            sender.send(message)
        fds = [file("unnamed") for _ in range(3)]
        socket.send_fds(sender, [b"READY=1"], fds)
        for fd in fds:
            os.close(fd)
    assert keeper.run("echo $LISTEN_FDS") == "0"
    assert {path.name for path in Path(f"/proc/{keeper.process.pid}/fd").iterdir()} <= set("012345")


def test_only_its_user_reaches_it(keeper: Keeper) -> None:
    assert [(keeper.place / name).stat().st_mode & 0o777 for name in ("notify", "kept")] == [0o600] * 2


def test_who_asks_waits_for_a_keeper(keeper: Keeper) -> None:
    assert keeper.end() == 0
    assert not service.listens()
    said: list[str] = []
    asking = threading.Thread(target=lambda: said.append(keeper.run("echo $LISTEN_FDS")))
    asking.start()
    keeper.start()
    asking.join(60)
    assert said == ["0"]
    assert service.listens()


def test_another_version_is_refused(place: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.bind(str(place / "kept"))
        other.listen()
        words = [*KEEPER, "run", str(place), "true"]
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as asking:
            with other.accept()[0] as connection:
                connection.send(json.dumps({"version": 2, "names": []}).encode())
            _, said = asking.communicate(timeout=60)
    assert asking.returncode == 1
    assert said == f"modelfs: the keeper in {place} speaks version 2, not 1: replace it\n"
