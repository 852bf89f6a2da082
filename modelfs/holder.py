"""The holder: a small process that keeps a mount alive while the daemons that serve it come and go.

It keeps ``/dev/fuse`` and the ledger open, has the daemon as its child and, when that dies, starts the next
one with the same two descriptors. Readers wait meanwhile; those the kernel serves by itself notice nothing.
It imports little and does little, so that it neither dies nor needs an upgrade itself. The first daemon is
older than it: ``modelfs mount``, which has imported most of what a daemon needs, forks that one too.

Where a service manager keeps descriptors over a restart of its service (systemd: ``FileDescriptorStoreMax=``;
in a container `modelfs.keeper`) the two are left with it. SIGTERM then ends the processes and leaves the
mount, and the next holder goes on.

Exit codes of the daemon: 0 after an unmount, `LEFT` when it left the mount to a successor; anything else is
a death. A daemon that dies before it has mounted takes the holder with it: there is nothing to keep.
"""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelfs import __version__, privileges, service
from modelfs.control.notice import Notice, posted
from modelfs.control.runtime import Record
from modelfs.errors import MountError
from modelfs.fuse import mountpoint as mountpoints
from modelfs.fuse import wire
from modelfs.fuse.ledger import Held, Ledger, head

log = logging.getLogger(__name__)

LEFT = 75
"""Exit code of a daemon that left its mount to a successor (EX_TEMPFAIL of sysexits.h)."""

QUICK_SECONDS = 3.0
"""A daemon that lives shorter has died quickly, and so has one that never came to serve."""

PAUSES = (0.0, 0.0, 0.5, 1.0, 2.0)
"""Seconds before the next daemon is started, by how many died quickly in a row; more are a crash loop."""

REST_SECONDS = 60.0
"""How long requests are answered with EIO in a crash loop before a daemon is tried again."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""They end the daemon, and so the holder; who has a daemon before its holder blocks them until that runs."""

_DEVICE, _LEDGER = "modelfs-device", "modelfs-ledger"
"""Names under which a service manager keeps the two."""


class Holder:
    """Keeps one mount.

    Args:
        mountpoint: where it is, for the unmount when no daemon can do it.
        settings: a file with what each daemon reads from its standard input; may hold secrets, so no command
            line has it.
        command: starts a daemon; the descriptors are appended as options.
        held: what there is to keep.
        daemon: the process id of a child that serves it already; None starts one.
        managed: whether it is the main process of a service, whose manager is told how it is.

    """

    def __init__(
        self,
        mountpoint: Path,
        settings: int,
        command: Sequence[str],
        held: Held,
        *,
        daemon: int | None = None,
        managed: bool = False,
    ) -> None:
        self._mountpoint = mountpoint
        self._settings = settings
        self._command = command
        self._managed = managed and service.is_there()
        self._kept = managed and service.keeps_descriptors()
        self._device, self._ledger = held.device, held.ledger
        self._daemon = daemon
        self._stopping = False
        self._wake, self._woken = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def run(self) -> int:
        """Run daemons until the tree is unmounted; return the exit code."""
        for number in SIGNALS:
            signal.signal(number, self._stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        quick = 0
        while True:
            started, served = time.monotonic(), self._incarnation()
            code = self._serve()
            if code == 0 or not self._is_mounted():
                return code
            if self._stopping:
                if self._kept:
                    return 0
                self._unmount()
                return code
            if code == LEFT:
                continue
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            long = time.monotonic() - started >= QUICK_SECONDS and self._incarnation() > served
            quick = 0 if long else quick + 1
            if quick < len(PAUSES):
                log.error("the daemon ended with %s; the next one takes the mount over", how)
                self._pause(PAUSES[quick])
            else:
                log.critical(
                    "%d daemons died one after the other, the last with %s: readers get EIO for %.0f s; "
                    "see the lines above",
                    quick,
                    how,
                    REST_SECONDS,
                )
                record, body = self._notice(quick, how)
                self._tell(f"STATUS={body['error']}")
                with posted(record, body) as notice:
                    self._refuse(REST_SECONDS, notice)
                quick = 0

    def _serve(self) -> int:
        """Let one daemon serve; return its exit code, negative for a signal."""
        daemon = self._daemon or self._start()
        if self._kept and service.may_be_replaced():
            self._keep_again(daemon)
        os.waitid(os.P_PID, daemon, os.WEXITED | os.WNOWAIT)
        self._daemon = None  # while its id cannot be another's yet
        return os.waitstatus_to_exitcode(os.waitpid(daemon, 0)[1])

    def _start(self) -> int:
        """Start a daemon, tell the manager, if there is one, when it serves, and return its process id."""
        words = [*self._command, "--device-fd", str(self._device), "--ledger-fd", str(self._ledger)]
        words += ["--kept"] * self._kept
        handed = {self._settings: 0, self._device: self._device, self._ledger: self._ledger}
        answers = ready = None
        if self._managed:
            answers, ready = os.pipe()
            words += ["--ready-fd", str(ready)]
            handed[ready] = ready
        os.lseek(self._settings, 0, os.SEEK_SET)
        actions = [(os.POSIX_SPAWN_DUP2, *each) for each in handed.items()]
        daemon = self._daemon = os.posix_spawn(words[0], words, os.environ, file_actions=actions)
        if self._stopping:
            os.kill(daemon, signal.SIGTERM)
        if answers is not None and ready is not None:
            os.close(ready)
            self._announce(answers, daemon)
        return daemon

    def _announce(self, answers: int, pid: int) -> None:
        """Tell the service manager once the daemon says on `answers` that it serves; it may end before."""
        with os.fdopen(answers) as pipe:
            said = json.loads(pipe.readline() or "{}")
        if not said.get("ok"):
            return
        self._keep()
        self._tell("READY=1", f"STATUS={self._mountpoint} is served by process {pid}")

    def _keep(self) -> None:
        if self._kept and self._is_mounted():
            service.keep(_DEVICE, self._device)
            service.keep(_LEDGER, self._ledger)

    def _keep_again(self, pid: int) -> None:
        """Leave the two with whoever is the manager now, again and again until the daemon `pid` ends."""
        daemon = os.pidfd_open(pid)  # it is our child: no other process has its id before we wait for it
        try:
            while not select.select([daemon], [], [], service.KEEP_SECONDS)[0]:
                self._keep()
        finally:
            os.close(daemon)

    def _tell(self, *assignments: str) -> None:
        if self._managed:
            service.tell(*assignments)

    def _stop(self, number: int, frame: object) -> None:
        """Pass a signal to end on to the daemon."""
        self._stopping = True
        self._tell("STOPPING=1")
        os.write(self._woken, b"x")
        if self._daemon is not None:
            os.kill(self._daemon, signal.SIGTERM)

    def _incarnation(self) -> int:
        return head(self._ledger).incarnation

    def _is_mounted(self) -> bool:
        return _is_mounted(self._device, self._ledger)

    def _pause(self, seconds: float) -> None:
        select.select([self._wake], [], [], seconds)

    def _notice(self, deaths: int, how: str) -> tuple[Record, dict[str, Any]]:
        """Return who listens on the control socket now, and what is said there."""
        now = time.time()
        since, retry = (_clock(at) for at in (now, now + REST_SECONDS))
        what = (
            f"{self._mountpoint}: refuses every read since {since}, after {deaths} quick deaths of "
            f"its daemon, the last with {how}; the next one is started at {retry}: see its log"
        )
        refusing = {"since": now, "deaths": deaths, "last": how, "retry_at": now + REST_SECONDS}
        record = Record(self._mountpoint, os.getpid(), now, __version__)
        return record, {"error": what, "kind": MountError.__name__, "refusing": refusing}

    def _refuse(self, seconds: float, notice: Notice | None) -> None:
        """Answer every request with EIO for a while: an error is better than waiting for nobody.

        Whoever asks on the control socket meanwhile is told by `notice`.
        """
        waiting: list[int | Notice] = [self._device, self._wake, *([notice] if notice else [])]
        until = time.monotonic() + seconds
        buffer = memoryview(bytearray(wire.READ_BUFFER))
        os.write(self._device, wire.resend())
        while not self._stopping and self._is_mounted() and (left := until - time.monotonic()) > 0:
            readable = select.select(waiting, [], [], left)[0]
            if notice is not None and notice in readable:
                notice.answer()
            if self._device not in readable:
                continue
            try:
                request = wire.request(buffer[: os.readv(self._device, (buffer,))])
                if request.opcode not in _WITHOUT_REPLY:
                    os.write(self._device, wire.header(request.unique, 0, errno.EIO))
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.ENOENT, errno.ENODEV):
                    raise

    def _unmount(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.umount2(os.fsencode(self._mountpoint), mountpoints.MNT_DETACH):
            log.error("%s could not be unmounted: %s", self._mountpoint, os.strerror(ctypes.get_errno()))


def _is_mounted(device: int, ledger: int) -> bool:
    """Return whether there is a mount that another daemon can take over."""
    terms = head(ledger)
    if not terms.incarnation or not terms.flags & wire.Init.HAS_RESEND:
        return False
    poll = select.poll()
    poll.register(device, 0)
    return not poll.poll(0)  # POLLERR: the connection has ended


def begin() -> Held:
    """Return what a holder keeps of a mount that is still to be made; OSError without ``/dev/fuse``."""
    return Held(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK), Ledger.create().fd)


def left_behind(mountpoint: Path) -> Held | None:
    """Return what the service manager kept of the mount on `mountpoint`; None if there is nothing to serve.

    What is of no use is dropped.
    """
    kept = service.kept()
    if not kept:
        return None
    mount = mountpoints.mount_at(mountpoint)
    try:
        held = Held(kept[_DEVICE], kept[_LEDGER])
        if mount is not None and mount.ours and _is_mounted(held.device, held.ledger):
            return held
        log.warning("what the service manager kept is no mount on %s any more", mountpoint)
    except (KeyError, ValueError) as error:
        log.warning("what the service manager kept is of no use: %s", error)
    service.drop()
    return None


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds))


_WITHOUT_REPLY = (wire.Opcode.FORGET, wire.Opcode.BATCH_FORGET, wire.Opcode.INTERRUPT)


def main() -> None:
    """Be a holder: ``python -m modelfs.holder MOUNTPOINT [DEVICE LEDGER DAEMON]``.

    Standard input is a file with the settings. The others are two descriptors and the process id of the first
    daemon; without them it is the main process of a service.
    """
    mountpoint = Path(sys.argv[1])
    device, ledger, daemon = map(int, sys.argv[2:]) if sys.argv[2:] else (None, None, None)
    managed = daemon is None
    if device is not None and ledger is not None:
        held = Held(device, ledger)
    else:
        held = left_behind(mountpoint) or begin()
    for fd in (held.device, held.ledger):
        os.set_inheritable(fd, False)
    line = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(format=line, level=logging.INFO)
    os.chdir("/")  # keep no directory busy
    settings = os.dup(0)
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
    privileges.limit(frozenset(privileges.Capability))  # its daemons cannot have more than it has
    command = [sys.executable, "-P", "-m", "modelfs", "daemon"]
    holder = Holder(mountpoint, settings, command, held, daemon=daemon, managed=managed)
    raise SystemExit(min(255, abs(holder.run())))


if __name__ == "__main__":
    main()
