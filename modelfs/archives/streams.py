"""What is inside of packed bytes, read forward from a checkpoint. Everything here blocks.

A checkpoint is a place in the packed bytes at which unpacking can begin, without what is before it.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple, Protocol

from modelfs.archives import File
from modelfs.errors import BadArchive

CHUNK = 256 * 1024
"""Packed bytes read at once."""


class Checkpoint(NamedTuple):
    """Where unpacking can begin.

    Attributes:
        unpacked: position in the unpacked stream.
        packed: position in the packed bytes of the first whole byte that is needed.
        bits: how many bits of the byte before that one are needed too.
        window: the unpacked bytes before it that later ones may refer to.

    """

    unpacked: int
    packed: int
    bits: int = 0
    window: bytes = b""


class Stream(Protocol):
    """Unpacked bytes, in order.

    Attributes:
        position: of the next byte.

    """

    position: int

    @property
    def packed(self) -> int:
        """Packed bytes that were needed until there."""

    def read(self, size: int) -> bytes:
        """Return between one and `size` bytes, none only at the end; BadArchive if they are damaged."""


class Stored:
    """Bytes that are not packed at all: `size` of them from `start` of the file, first of all `position`."""

    def __init__(self, file: File, start: int, size: int, position: int) -> None:
        file.seek(start + position)
        self._file = file
        self._size = size
        self.position = self.packed = position

    def read(self, size: int) -> bytes:
        """Return between one and `size` bytes, none only at the end."""
        data = self._file.read(min(size, self._size - self.position))
        self.position += len(data)
        self.packed = self.position
        return data


class Deflated:
    """The content of a deflated member of a zip archive (RFC 1951)."""

    def __init__(self, file: File, start: int, packed: int, size: int) -> None:
        file.seek(start)
        self._file = file
        self._left = packed
        self._size = size
        self._inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        self._input = b""
        self.position = 0
        self.packed = 0

    def read(self, size: int) -> bytes:
        """Return between one and `size` bytes, none only at the end.

        Raises:
            BadArchive: they are damaged, or fewer or more than the member's size.

        """
        size = min(size, self._size - self.position)
        data = self._some(size) if size else b""
        self.position += len(data)
        ends = self.position == self._size
        if (size and not data) or (ends and data and (self._some(1) or not self._inflate.eof)):
            raise BadArchive("a member has another size than it says")
        return data

    def _some(self, size: int) -> bytes:
        try:
            while not self._inflate.eof:
                if not self._input and self._left:
                    self._input = self._file.read(min(CHUNK, self._left))
                    if not self._input:
                        raise BadArchive("it is truncated in the content of a member")
                    self._left -= len(self._input)
                    self.packed += len(self._input)
                data = self._inflate.decompress(self._input, size)
                self._input = self._inflate.unconsumed_tail
                if data:
                    return data
                if not self._input and not self._left and not self._inflate.eof:
                    raise BadArchive("the content of a member ends early")
        except zlib.error as error:
            raise BadArchive(f"the content of a member is damaged: {error}") from error
        return b""
