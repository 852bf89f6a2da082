"""What the successor of a daemon must know of the mount it takes over: the terms and the open handles.

The ledger is a memory file (memfd_create(2)) that outlives its writer: the holder keeps its descriptor and
passes it on with the device. It is written before the kernel is told, so that whatever the kernel knows is in
it; a writer that is killed between the two leaves a line too many, never one too few, and the kernel asks
again for what was not answered (``FUSE_NOTIFY_RESEND``).

Layout, version 1, in the machine's byte order:

======  =====  ===================================================================
offset  bytes  header
======  =====  ===================================================================
0       8      magic ``modelfsL``
8       4      version of this layout, 1
12      4      how many daemons have served the mount; 0 while there is no mount
16      8      flags agreed on with the kernel in INIT
24      4      whether complete files are read by the kernel itself
28      36     zero
======  =====  ===================================================================

After it one line for each open handle, of 32 bytes: handle (0: the line is free), node, the request that
opened it, backing id, kind. A line is filled from its end to its start, so that a handle stands only over a
line that is whole.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct
from typing import NamedTuple

VERSION = 1

_MAGIC = b"modelfsL"
_HEADER = Struct("=8sIIQI36x")
_LINE = Struct("=QQQii")
_REST = Struct("=QQii")
_HANDLE = Struct("=Q")
_GROWTH = 1024
"""Lines by which the file grows."""

CACHED, BACKED, DIRECTORY = 0, 1, 2
"""Kinds of a handle: read through the daemon, read by the kernel itself, or a directory."""


class Line(NamedTuple):
    """One open handle: `node` is its inode, `request` opened it, `backing` is the kernel's id of its file."""

    handle: int
    node: int
    request: int
    backing: int
    kind: int


class Head(NamedTuple):
    """The header of a ledger: daemons so far, the terms with the kernel, and whether it reads by itself."""

    incarnation: int
    flags: int
    passthrough: bool


def head(fd: int) -> Head:
    """Return the header of the ledger `fd`, whose lines may be many and are not read.

    Raises:
        ValueError: the file is a ledger of another version, or none.

    """
    magic, version, incarnation, flags, passthrough = _HEADER.unpack(os.pread(fd, _HEADER.size, 0))
    if magic != _MAGIC or version != VERSION:
        raise ValueError(f"the mount was left by another version of modelfs ({version})")
    return Head(incarnation, flags, bool(passthrough))


class Ledger:
    """The ledger of one mount, in the memory file `fd`; belongs to one thread.

    Raises:
        ValueError: the file is a ledger of another version, or none.

    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        if not os.fstat(fd).st_size:
            os.ftruncate(fd, _HEADER.size + _GROWTH * _LINE.size)
            os.pwrite(fd, _HEADER.pack(_MAGIC, VERSION, 0, 0, 0), 0)
        self._map = mmap.mmap(fd, 0)
        self.incarnation, self.flags, self.passthrough = head(fd)
        self._places = {line.handle: place for place, line in self._lines()}
        taken = set(self._places.values())
        self._free = [place for place in self._all_places() if place not in taken]

    @classmethod
    def create(cls) -> Ledger:
        """Return a new ledger."""
        return cls(os.memfd_create("modelfs ledger", os.MFD_CLOEXEC))

    def begin(self, flags: int, *, passthrough: bool) -> None:
        """Note the terms, and that one daemon more serves the mount."""
        self.incarnation += 1
        self.flags, self.passthrough = flags, passthrough
        _HEADER.pack_into(self._map, 0, _MAGIC, VERSION, self.incarnation, flags, passthrough)

    def open(self, line: Line) -> None:
        """Note an open handle."""
        if not self._free:
            self._grow()
        place = self._free.pop()
        _REST.pack_into(self._map, place + _HANDLE.size, *line[1:])
        _HANDLE.pack_into(self._map, place, line.handle)
        self._places[line.handle] = place

    def close(self, handle: int) -> None:
        """Strike an open handle out; nothing happens if there is none."""
        place = self._places.pop(handle, None)
        if place is not None:
            _HANDLE.pack_into(self._map, place, 0)
            self._free.append(place)

    def __contains__(self, handle: int) -> bool:
        return handle in self._places

    def lines(self) -> list[Line]:
        """Return all open handles."""
        return [line for _, line in self._lines()]

    def _lines(self) -> Iterator[tuple[int, Line]]:
        for place in self._all_places():
            line = Line._make(_LINE.unpack_from(self._map, place))
            if line.handle:
                yield place, line

    def _all_places(self) -> range:
        return range(_HEADER.size, len(self._map) - _LINE.size + 1, _LINE.size)

    def _grow(self) -> None:
        old = self._all_places()
        self._map.resize(len(self._map) + _GROWTH * _LINE.size)
        self._free = [place for place in self._all_places() if place >= old.stop]


@dataclass(frozen=True, slots=True)
class Held:
    """What a holder keeps for the daemon and its successors: descriptors of the device and the ledger.

    If they are `kept` by a service manager too, the mount outlives the holder.
    """

    device: int
    ledger: int
    kept: bool = False

    @property
    def mounted(self) -> bool:
        """Whether an earlier daemon has mounted already."""
        return head(self.ledger).incarnation > 0

    @property
    def handovers(self) -> int:
        """How many daemons have taken the mount over."""
        return max(0, head(self.ledger).incarnation - 1)
