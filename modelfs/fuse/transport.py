"""Which transport a mount gets, and what the daemon needs of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, Protocol

from modelfs.errors import MountError
from modelfs.fuse import kernel
from modelfs.fuse.device import Device, open_device
from modelfs.fuse.ledger import Held, Ledger
from modelfs.fuse.operations import Operations
from modelfs.tree import Change

Wanted = Literal["auto", "kernel", "pyfuse3"]


class Transport(Protocol):
    """A mount, and the conversation with the kernel about it.

    Attributes:
        name: ``kernel`` or ``pyfuse3``.
        passthrough: whether the kernel reads complete files without the daemon.

    """

    name: str
    passthrough: bool

    async def run(self) -> None:
        """Answer requests until the tree is unmounted or the caller is cancelled."""

    async def invalidate(self, changes: Iterable[Change]) -> None:
        """Make the kernel look up the changed names anew; return when it will."""

    def leave(self) -> None:
        """Let `run` return once what was begun is answered, and leave the mount to a successor."""

    def close(self, *, unmount: bool) -> None:
        """Give the device up, and unmount if that has not happened yet."""


def connect(
    wanted: Wanted,
    operations: Callable[[int], Operations],
    mountpoint: Path,
    *,
    allow_other: bool,
    cache: Path,
    held: Held | None,
) -> tuple[Transport, str]:
    """Mount or take over, and return the transport and why it is this one.

    ``auto`` takes `kernel` where passthrough works: without it nothing is gained over libfuse.

    Args:
        wanted: what the user asked for.
        operations: makes what answers; its argument is the number of the first handle.
        mountpoint: an existing directory.
        allow_other: other users may read too.
        cache: the directory with the data files.
        held: what the holder keeps, if there is one.

    Raises:
        MountError: nothing is mounted.

    """
    why = "asked for"
    if wanted != "pyfuse3":
        try:
            ledger = Ledger(held.ledger) if held else Ledger.create()
            device = Device(held.device if held else open_device())
            answers = operations((ledger.incarnation << 40) + 1)
            if ledger.incarnation:
                own = kernel.Transport.adopt(answers, mountpoint, device, ledger)
            else:
                own = kernel.Transport.mount(
                    answers,
                    mountpoint,
                    device,
                    ledger,
                    allow_other=allow_other,
                    cache=cache,
                    demanding=wanted == "auto",
                )
        except MountError as error:
            if wanted == "kernel":
                raise
            why = str(error)
        else:
            return own, own.why
    # Only now: it needs libfuse3, which the other transport does without.
    from modelfs.fuse import pyfuse

    return pyfuse.Transport(operations(1), mountpoint, allow_other=allow_other), why
