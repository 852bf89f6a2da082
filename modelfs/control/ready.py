"""Does the mount answer? A process of its own asks: whoever touches the mount may have to wait for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import trio

from modelfs.fuse import mountpoint

# stat() is answered from the kernel's cache; statvfs() always reaches the daemon.
_ASK = "import os, sys; os.statvfs(sys.argv[1])"


class Readiness:
    """Asks whether `place` is mounted and answers within `seconds`.

    A request that the daemon has taken cannot be interrupted, not even by SIGKILL: while such a process is
    left, the mount does not answer, and no other process is started.
    """

    def __init__(self, place: Path, seconds: float = 5.0) -> None:
        self._place = place
        self._seconds = seconds
        self._lock = trio.Lock()
        self._asking: trio.Process | None = None

    async def why_not(self) -> str | None:
        """Return why the mount is not ready; None if it is. Never touches the mount itself."""
        async with self._lock:
            mount = await trio.to_thread.run_sync(mountpoint.mount_at, self._place)
            if mount is None or not mount.ours:
                return f"{self._place} is not mounted"
            if self._asking is None or self._asking.poll() is not None:
                self._asking = await self._ask()
            code = self._asking.poll()
        if code is None:
            return f"{self._place} does not answer within {self._seconds:g} s"
        return f"{self._place} answers with an error" if code else None

    async def _ask(self) -> trio.Process:
        # Isolated and with an empty environment: it needs no secret that may stand there.
        process = await trio.lowlevel.open_process(
            [sys.executable, "-ISc", _ASK, str(self._place)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
        )
        try:
            with trio.move_on_after(self._seconds):
                await process.wait()
        finally:
            if process.poll() is None:
                process.kill()
        return process
