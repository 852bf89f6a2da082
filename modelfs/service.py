"""The service manager: telling systemd how we are, and leaving descriptors with it over a restart.

Its protocols are sd_notify(3) and sd_listen_fds(3); they need no library. In a container `modelfs.keeper`
takes its place. Without a service manager nothing in here does anything.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence

log = logging.getLogger(__name__)

FIRST = 3
"""Number of the first descriptor that the manager passes (SD_LISTEN_FDS_START)."""

KEEP_SECONDS = 5.0
"""How often a manager that may be replaced gets again what it shall keep."""

_TOLD = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


def is_there() -> bool:
    """Return whether a service manager started this very process and listens (``Type=notify``).

    Children inherit its variables; systemd 248 tells them apart by ``$SYSTEMD_EXEC_PID``.
    """
    own = str(os.getpid())
    if os.environ.get("SYSTEMD_EXEC_PID", own) != own:
        return False
    return os.environ.get("NOTIFY_SOCKET", "").startswith(("/", "@"))


def keeps_descriptors() -> bool:
    """Return whether it keeps descriptors over a restart: systemd 254 says so with ``$FDSTORE``."""
    return is_there() and os.environ.get("FDSTORE", "0") != "0"


def may_be_replaced() -> bool:
    """Return whether the manager can end and another take its place, which then keeps nothing: our keeper."""
    return "MODELFS_KEEPER" in os.environ


def listens() -> bool:
    """Return whether there is a manager now; also children of the process that it started may ask."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.connect(_address())
    except OSError:
        return False
    return True


def _address() -> str:
    address = os.environ["NOTIFY_SOCKET"]
    return f"\0{address[1:]}" if address.startswith("@") else address


def tell(*assignments: str, descriptors: Sequence[int] = ()) -> None:
    """Send assignments such as ``READY=1``, and copies of descriptors; a failure is logged."""
    if not is_there():
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.connect(_address())
            socket.send_fds(manager, ["\n".join(assignments).encode()], descriptors)
    except OSError as error:
        log.warning("the service manager could not be told %s: %s", assignments[0], error)


def keep(name: str, descriptor: int) -> None:
    """Leave a copy of `descriptor` with the manager under `name`; one that it has already is not doubled."""
    tell("FDSTORE=1", f"FDNAME={name}", descriptors=[descriptor])


def kept() -> dict[str, int]:
    """Return the descriptors that the manager kept for this process, by name."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    numbers = range(FIRST, FIRST + int(os.environ.get("LISTEN_FDS", "0")))
    return dict(zip(names, numbers, strict=False))


def drop() -> None:
    """Close what the manager kept, and let it close its copies too."""
    for name, number in kept().items():
        tell("FDSTOREREMOVE=1", f"FDNAME={name}")
        os.close(number)
    for variable in _TOLD:
        os.environ.pop(variable, None)
