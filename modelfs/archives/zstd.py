"""Zstandard (RFC 8878) unpacked forward; each of its frames can be entered at its beginning.

The headers of frames and blocks are read here, so that it is known where frames begin, and that no piece
that is unpacked at once becomes more than a block. What is in a block is the library's matter. A seek table
(of the seekable format) is a skippable frame: what it says is found in passing.
"""

from __future__ import annotations

from typing import Any

from modelfs.archives import File
from modelfs.archives.gzip import Mark
from modelfs.archives.streams import CHUNK, Checkpoint
from modelfs.errors import BadArchive, ConfigError

MAX_WINDOW = 2**27
"""Largest window in bytes, memory that unpacking needs: that of ``zstd --ultra -22``."""

_MAGIC, _SKIPPABLE = 0xFD2FB528, 0x184D2A50
_RAW, _RLE, _COMPRESSED = range(3)
_MAX_BLOCK = 128 * 1024


class Zstd:
    """The content of a zstd file, from its beginning or from a frame on; arguments are as of `Gzip`."""

    def __init__(
        self, file: File, begin: Checkpoint | None = None, spacing: int = 0, mark: Mark | None = None
    ) -> None:
        try:
            import zstandard  # an extra
        except ImportError as error:
            raise ConfigError(".tar.zst archives need zstandard: pip install 'modelfs[zstd]'") from error
        self._library = zstandard
        self._file = file
        self._spacing = spacing
        self._mark = mark
        self._output = b""
        self._frame: Any = None
        self._checksum = 0
        self.packed = begin.packed if begin else 0
        self.position = begin.unpacked if begin else 0
        self._last = self.position
        file.seek(self.packed)

    def read(self, size: int) -> bytes:
        """Return between one and `size` bytes, none only at the end.

        Raises:
            BadArchive: they are damaged or end early.

        """
        try:
            while not self._output:
                if self._frame is None and not self._begin():
                    return b""
                if self._frame is not None:
                    self._output = self._block()
        except self._library.ZstdError as error:
            raise BadArchive(f"it is damaged: {error}") from error
        data, self._output = self._output[:size], self._output[size:]
        self.position += len(data)
        return data

    def _begin(self) -> bool:
        """Pass over the header of the next frame; return whether there is one."""
        start = self.packed
        raw = self._file.read(4)
        self.packed += len(raw)
        if not raw:
            return False
        magic = int.from_bytes(raw, "little")
        if len(raw) == 4 and magic & 0xFFFFFFF0 == _SKIPPABLE:
            left = int.from_bytes(self._exactly(4), "little")
            while left:  # whoever compares a digest wants to see all of it
                left -= len(self._exactly(min(CHUNK, left)))
            return True
        if len(raw) < 4 or magic != _MAGIC:
            raise BadArchive("it is no zstd file, or there is something else behind its end")
        first = self._exactly(1)
        single, self._checksum = first[0] >> 5 & 1, (first[0] >> 2 & 1) * 4
        sizes = (single, 2, 4, 8)
        rest = self._exactly(1 - single + (0, 1, 2, 4)[first[0] & 3] + sizes[first[0] >> 6])
        if first[0] & 3:
            raise BadArchive("it needs a dictionary: pack it without one")
        if self._mark and self._spacing and self.position - self._last >= self._spacing:
            self._mark(Checkpoint(self.position, start))
            self._last = self.position
        decompressor = self._library.ZstdDecompressor(max_window_size=MAX_WINDOW)
        self._frame = decompressor.decompressobj()
        self._frame.decompress(raw + first + rest)
        return True

    def _block(self) -> bytes:
        """Return what is in the next block of the frame."""
        header = self._exactly(3)
        value = int.from_bytes(header, "little")
        last, kind, size = value & 1, value >> 1 & 3, value >> 3
        if kind > _COMPRESSED or size > _MAX_BLOCK:
            raise BadArchive("it is damaged: a block of no known type or size")
        content = self._exactly(1 if kind == _RLE else size)
        data: bytes = self._frame.decompress(header + content)
        if last:
            data += self._frame.decompress(self._exactly(self._checksum)) if self._checksum else b""
            if not self._frame.eof:
                raise BadArchive("it is damaged: a frame does not end where it says")
            self._frame = None
        return data

    def _exactly(self, size: int) -> bytes:
        data = self._file.read(size)
        self.packed += len(data)
        if len(data) != size:
            raise BadArchive("it is truncated")
        return data
