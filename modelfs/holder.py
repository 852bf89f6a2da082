"""The holder: a small process that keeps a mount alive while the daemons that serve it come and go.

It keeps ``/dev/fuse`` and the ledger open, runs the daemon as its child and, when that dies, starts the next
one with the same two descriptors. Readers wait meanwhile; those the kernel serves by itself notice nothing.
It imports little and does little, so that it neither dies nor needs an upgrade itself.

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
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

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

_DEVICE, _LEDGER = "modelfs-device", "modelfs-ledger"
"""Names under which a service manager keeps the two."""


class Holder:
    """Keeps one mount.

    Args:
        mountpoint: where it is, for the unmount when no daemon can do it.
        settings: what each daemon reads from its standard input; may hold secrets, so no command line has it.
        command: starts a daemon; the descriptors are appended as options.
        managed: whether it is the main process of a service, whose manager is told how it is.
        held: what an earlier holder left with the manager; None begins a new mount.

    """

    def __init__(
        self,
        mountpoint: Path,
        settings: bytes,
        command: Sequence[str],
        *,
        managed: bool,
        held: Held | None = None,
    ) -> None:
        self._mountpoint = mountpoint
        self._settings = settings
        self._command = command
        self._managed = managed and service.is_there()
        self._kept = managed and service.keeps_descriptors()
        if held is None:
            device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            held = Held(device, Ledger.create().fd)
        self._device, self._ledger = held.device, held.ledger
        self._daemon: subprocess.Popen[bytes] | None = None
        self._stopping = False
        self._wake, self._woken = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def run(self, ready: int | None = None) -> int:
        """Run daemons until the tree is unmounted; return the exit code.

        Args:
            ready: a descriptor that the first daemon gets as ``--ready-fd``; closed here.

        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        quick = 0
        while True:
            started, served = time.monotonic(), self._incarnation()
            code = self._serve(ready)
            ready = None
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

    def _serve(self, ready: int | None) -> int:
        """Run one daemon; return its exit code, negative for a signal."""
        words = [*self._command, "--device-fd", str(self._device), "--ledger-fd", str(self._ledger)]
        words += ["--kept"] * self._kept
        handed = [self._device, self._ledger]
        answers = None
        if self._managed:
            answers, ready = os.pipe()
        if ready is not None:
            words += ["--ready-fd", str(ready)]
            handed.append(ready)
        self._daemon = subprocess.Popen(  # noqa: S603  # our own words
            words, stdin=subprocess.PIPE, pass_fds=handed
        )
        if ready is not None:
            os.close(ready)
        try:
            with cast(IO[bytes], self._daemon.stdin) as pipe:
                pipe.write(self._settings)
        except BrokenPipeError:
            log.error("the daemon ended before it had read its settings")
        if self._stopping:
            self._daemon.terminate()
        if answers is not None:
            self._announce(answers, self._daemon.pid)
        if self._kept and service.may_be_replaced():
            self._keep_again(self._daemon.pid)
        return self._daemon.wait()

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
        if self._daemon is not None and self._daemon.returncode is None:
            self._daemon.terminate()

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
    """Be the holder that ``modelfs mount`` started: ``python -m modelfs.holder MOUNTPOINT [READY_FD]``.

    Without READY_FD it is the main process of a service.
    """
    mountpoint, ready = Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else None
    held = left_behind(mountpoint) if ready is None else None
    for fd in (ready, *((held.device, held.ledger) if held else ())):
        if fd is not None:
            os.set_inheritable(fd, False)
    line = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(format=line, level=logging.INFO)
    os.chdir("/")  # keep no directory busy
    settings = sys.stdin.buffer.read()
    privileges.limit(frozenset(privileges.Capability))  # its daemons cannot have more than it has
    command = [sys.executable, "-P", "-m", "modelfs", "daemon"]
    holder = Holder(mountpoint, settings, command, managed=ready is None, held=held)
    raise SystemExit(min(255, abs(holder.run(ready))))


if __name__ == "__main__":
    main()
