"""The keeper: keeps what belongs to a mount while the container that serves it is replaced by another.

It is for a container what the store of descriptors of systemd is for a service, and nothing else of a service
manager. Its directory, which both containers have, holds two sockets for root alone:

``notify``
    Takes datagrams of sd_notify(3): ``FDSTORE=1`` with ``FDNAME=`` and a descriptor keeps it, in the place of
    one that had the name; ``FDSTOREREMOVE=1`` with ``FDNAME=`` closes it. All else is ignored.
``kept``
    Sends to whoever connects one message (SOCK_SEQPACKET) of JSON, ``{"version": 1, "names": […]}``, and with
    it the descriptors of these names (SCM_RIGHTS of unix(7)). They stay kept.

What is kept is dropped when the kernel ends the conversation that one of the descriptors belongs to: the tree
was unmounted then. A keeper may be replaced while a daemon serves: the holder gives its successor the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from modelfs import privileges, service
from modelfs.errors import MountError
from modelfs.fuse import mountpoint

log = logging.getLogger(__name__)

VERSION = 1
"""Of the messages."""

LIMIT = 16
"""So many descriptors are kept at most; a mount has two."""

LEAVE_SECONDS = 20.0
"""How long the end of a keeper waits for a daemon that ends at the same time."""

PAUSE_SECONDS = 0.5
"""How often it is looked whether there is a keeper, and whether there still is a daemon."""


class Keeper:
    """Keeps the descriptors of one mount; belongs to one thread.

    Args:
        directory: where its sockets are made; both are taken over from a keeper that was there before.

    Raises:
        OSError: they cannot be made.

    """

    def __init__(self, directory: Path) -> None:
        self.kept: dict[str, int] = {}
        self._notices = _bound(directory / "notify", socket.SOCK_DGRAM)
        self._requests = _bound(directory / "kept", socket.SOCK_SEQPACKET)
        self._requests.listen()

    def close(self) -> None:
        """Take no more, give no more, and close what is kept: the kernel ends a mount that nobody serves."""
        self._notices.close()
        self._requests.close()
        self._drop(list(self.kept))

    def step(self) -> None:
        """Wait until something happens, and do it."""
        poll = select.poll()
        for waiting in (self._notices, self._requests):
            poll.register(waiting, select.POLLIN)
        for fd in self.kept.values():
            poll.register(fd, 0)  # POLLERR comes all the same
        ready = {fd for fd, _ in poll.poll()}
        if ready & set(self.kept.values()):
            log.info("the mount has ended: nothing is kept")
            self._drop(list(self.kept))
        if self._notices.fileno() in ready:
            self._take()
        if self._requests.fileno() in ready:
            self._give()

    def _take(self) -> None:
        message, fds, _, _ = socket.recv_fds(self._notices, 4096, LIMIT, socket.MSG_CMSG_CLOEXEC)
        said = dict(line.partition("=")[::2] for line in message.decode(errors="replace").splitlines())
        name = said.get("FDNAME", "stored")
        if said.get("FDSTOREREMOVE") == "1":
            self._drop([name])
        elif said.get("FDSTORE") == "1" and fds and (name in self.kept or len(self.kept) < LIMIT):
            if name not in self.kept:
                log.info("keeping %s", name)
            self._drop([name])
            self.kept[name] = fds.pop(0)
        for fd in fds:
            os.close(fd)

    def _give(self) -> None:
        with self._requests.accept()[0] as asking:
            names = list(self.kept)
            message = json.dumps({"version": VERSION, "names": names}).encode()
            try:
                socket.send_fds(asking, [message], [self.kept[name] for name in names])
            except OSError as error:
                log.warning("who asked has not waited for the answer: %s", error.strerror)

    def _drop(self, names: Sequence[str]) -> None:
        for name in names:
            if name in self.kept:
                os.close(self.kept.pop(name))


def _bound(path: Path, kind: int) -> socket.socket:
    """Return a socket at `path` that only this user can reach."""
    path.unlink(missing_ok=True)
    own = socket.socket(socket.AF_UNIX, kind)
    before = os.umask(0o177)
    try:
        own.bind(str(path))
    finally:
        os.umask(before)
    return own


def keep(directory: Path, place: Path) -> None:
    """Be the keeper of the mount on `place` until SIGTERM or SIGINT comes; then leave no dead mount behind.

    If a daemon serves on, the mount is its own to end, or to leave with the next keeper.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit())
    with contextlib.closing(Keeper(directory)) as keeper:
        log.info("keeping what belongs to %s", place)
        try:
            while True:
                keeper.step()
        except SystemExit:
            log.info("ending")
    _clear(place)


def _clear(place: Path) -> None:
    """Take the mount on `place` away if its daemon has ended, or does soon: nobody will serve it again."""
    until = time.monotonic() + LEAVE_SECONDS
    while mountpoint.mount_at(place) is not None and time.monotonic() < until:
        with contextlib.suppress(MountError):  # it does not answer: its daemon may be about to end
            if mountpoint.is_stale(place, PAUSE_SECONDS):
                log.warning("%s: nobody serves it any more: taken away", place)
                mountpoint.detach(place, lazy=True)
                continue
        time.sleep(PAUSE_SECONDS)


def run(directory: Path, command: Sequence[str]) -> NoReturn:
    """Become `command`, with what is kept in `directory`, as a service manager starts it (sd_listen_fds(3)).

    Waits until there is a keeper.

    Raises:
        MountError: the keeper speaks another version.

    """
    received = _received(directory)
    pid, first = str(os.getpid()), service.FIRST
    os.environ.update(
        NOTIFY_SOCKET=str(directory / "notify"),
        FDSTORE=str(LIMIT),
        SYSTEMD_EXEC_PID=pid,
        MODELFS_KEEPER=str(directory),
        LISTEN_PID=pid,
        LISTEN_FDS=str(len(received)),
        LISTEN_FDNAMES=":".join(received),
    )
    # Out of the way first: one of them may have a number that is another's.
    above = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, first + len(received)) for fd in received.values()]
    for number, fd in enumerate(above, first):
        os.dup2(fd, number)
    os.execvp(command[0], list(command))  # noqa: S606  # our own words


def _received(directory: Path) -> dict[str, int]:
    """Return what the keeper has, by name; wait until there is one."""
    waiting = False
    while (answer := _asked(directory)) is None:
        if not waiting:
            log.warning("there is no keeper in %s yet: waiting for it", directory)
        waiting = True
        time.sleep(PAUSE_SECONDS)
    message, fds = answer
    said = json.loads(message)
    if said["version"] != VERSION:
        raise MountError(
            f"the keeper in {directory} speaks version {said['version']}, not {VERSION}: replace it"
        )
    return dict(zip(said["names"], fds, strict=True))


def _asked(directory: Path) -> tuple[bytes, list[int]] | None:
    """Return the keeper's message and its descriptors; None if there is no keeper, or it ends just now."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as keeper:
        try:
            keeper.connect(str(directory / "kept"))
            message, fds, _, _ = socket.recv_fds(keeper, 4096, LIMIT, socket.MSG_CMSG_CLOEXEC)
        except (FileNotFoundError, ConnectionError):
            return None
    return (message, fds) if message else None


def main() -> None:
    """Run ``python -m modelfs.keeper keep DIRECTORY MOUNTPOINT`` or ``… run DIRECTORY COMMAND…``."""
    line = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(format=line, level=logging.INFO)
    word, directory, *rest = sys.argv[1:]
    if word == "run":
        try:
            run(Path(directory), rest)
        except MountError as error:
            sys.exit(f"modelfs: {error}")
    privileges.limit(frozenset({privileges.Capability.SYS_ADMIN}))
    keep(Path(directory), mountpoint.canonical(Path(rest[0])))


if __name__ == "__main__":
    main()
