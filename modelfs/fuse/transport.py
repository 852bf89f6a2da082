"""Which transport a mount gets, and what the daemon needs of one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Protocol

from modelfs.errors import MountError
from modelfs.fuse import kernel
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
        """Make the kernel look up the changed names anew."""

    def close(self, *, unmount: bool) -> None:
        """Give the device up, and unmount if that has not happened yet."""


def connect(
    wanted: Wanted, operations: Operations, mountpoint: Path, *, allow_other: bool, cache: Path
) -> tuple[Transport, str]:
    """Mount, and return the transport and why it is this one.

    ``auto`` takes `kernel` where passthrough works: without it nothing is gained over libfuse.

    Args:
        wanted: what the user asked for.
        operations: what answers.
        mountpoint: an existing directory.
        allow_other: other users may read too.
        cache: the directory with the data files.

    Raises:
        MountError: nothing is mounted.

    """
    why = "asked for"
    if wanted != "pyfuse3":
        try:
            own = kernel.Transport(operations, mountpoint, allow_other=allow_other, cache=cache)
        except MountError as error:
            if wanted == "kernel":
                raise
            why = str(error)
        else:
            if own.passthrough or wanted == "kernel":
                return own, own.why
            own.close(unmount=True)
            why = own.why
    # Only now: it needs libfuse3, which the other transport does without.
    from modelfs.fuse import pyfuse

    return pyfuse.Transport(operations, mountpoint, allow_other=allow_other), why
