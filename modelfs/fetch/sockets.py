"""The sockets of one handle of the range client, which another thread can shut down."""

from __future__ import annotations

import contextlib
import os
import socket
import threading


class Sockets:
    """Knows the open sockets of a thread that may wait on any of them; `abort` wakes it.

    Attributes:
        aborted: whether nothing may be opened or used any more.

    """

    def __init__(self) -> None:
        self.aborted = False
        self._lock = threading.Lock()
        self._open: set[int] = set()

    def opened(self, fd: int) -> bool:
        """Take `fd` in; return False if it must not be used."""
        with self._lock:
            if not self.aborted:
                self._open.add(fd)
            return not self.aborted

    def close(self, fd: int) -> None:
        """Close `fd`; under the lock, so that `abort` never meets a number that means another file by now."""
        with self._lock:
            self._open.discard(fd)
            os.close(fd)

    def abort(self) -> bool:
        """Shut all sockets down, from another thread; return whether there was one.

        That wakes who waits for a silent server. Where there is none a name is being looked up: libc cannot
        be interrupted there, but no sink has been reached either.
        """
        with self._lock:
            self.aborted = True
            for fd in self._open:
                sock = socket.socket(fileno=fd)
                with contextlib.suppress(OSError):  # not connected any more
                    sock.shutdown(socket.SHUT_RDWR)
                sock.detach()
            return bool(self._open)
