"""What root can raise for a mount after it was made: readahead and requests in flight.

The kernel takes the smaller of its own 128 KiB and the file system's readahead at INIT, and lets 12
asynchronous requests be in flight; both can be raised later through sysfs (Documentation/ABI/testing/
sysfs-class-bdi and fs/fuse/control.c). Measured: with 128 → 1024 KiB the requests of a 2 GiB read fall from
16,384 to about 2,000.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)

READ_AHEAD_KB = 1020
"""KiB of kernel readahead: one request of the largest size. Larger pages than 4 KiB get no more than this."""

MAX_BACKGROUND = 128
"""Asynchronous requests (readahead, O_DIRECT) that the kernel sends before it waits for an answer."""


def tune(device: str) -> None:
    """Raise the limits of the mount whose device is ``MAJOR:MINOR``; log what could not be raised and why.

    Only root may; for others nothing is tried.
    """
    if os.geteuid() != 0:
        log.info("kernel readahead stays at 128 KiB: only root may raise it")
        return
    minor = device.partition(":")[2]
    wanted = {
        Path(f"/sys/class/bdi/{device}/read_ahead_kb"): READ_AHEAD_KB,
        Path(f"/sys/fs/fuse/connections/{minor}/max_background"): MAX_BACKGROUND,
        Path(f"/sys/fs/fuse/connections/{minor}/congestion_threshold"): MAX_BACKGROUND * 3 // 4,
    }
    for file, value in wanted.items():
        try:
            file.write_text(str(value))
        except FileNotFoundError:
            # The kernel has no such limit for this mount, or fusectl is not mounted.
            log.info("%s does not exist: left as it is", file)
        except OSError as error:
            log.warning("%s: %s: left as it is", file, error.strerror)
