"""Gzip (RFC 1952) unpacked forward, with checkpoints in its middle.

This is the method of ``examples/zran.c`` in zlib: at the end of a deflate block the last 32 KiB, the position
in bytes and that in bits are all that is needed to go on from there later. The ``zlib`` of the standard
library does not tell where blocks end and cannot begin inside of a byte, so the C library itself is called.
The packages that do this (indexed_gzip) unpack everything twice for the first pass, and for each read again
from the checkpoint before it.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from functools import cache

from modelfs.archives import File
from modelfs.archives.streams import CHUNK, Checkpoint
from modelfs.errors import BadArchive, ConfigError

_WINDOW = 32768
_OK, _STREAM_END, _BUF_ERROR, _MEM_ERROR = 0, 1, -5, -4
_BLOCK = 5
_RAW, _GZIP = -15, 31
_TRAILER = 8
_LIBRARY = "libz.so.1"

Mark = Callable[[Checkpoint], None]
"""Is told of each checkpoint when it is passed."""


class _ZStream(ctypes.Structure):
    """``z_stream`` of ``zlib.h``."""

    _fields_ = (
        ("next_in", ctypes.c_void_p),
        ("avail_in", ctypes.c_uint),
        ("total_in", ctypes.c_ulong),
        ("next_out", ctypes.c_void_p),
        ("avail_out", ctypes.c_uint),
        ("total_out", ctypes.c_ulong),
        ("msg", ctypes.c_char_p),
        ("state", ctypes.c_void_p),
        ("zalloc", ctypes.c_void_p),
        ("zfree", ctypes.c_void_p),
        ("opaque", ctypes.c_void_p),
        ("data_type", ctypes.c_int),
        ("adler", ctypes.c_ulong),
        ("reserved", ctypes.c_ulong),
    )


@cache
def _zlib() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise ConfigError(f"gzip archives need {_LIBRARY}: install zlib (Debian: zlib1g)") from error
    library.zlibVersion.restype = ctypes.c_char_p
    return library


class Gzip:
    """The content of a gzip file, from its beginning or from a checkpoint on.

    Args:
        file: the packed bytes.
        begin: where to begin; None for the beginning. The checksum at the end is compared only then.
        spacing: unpacked bytes between two checkpoints; 0 for none.
        mark: is told of them.

    """

    def __init__(
        self, file: File, begin: Checkpoint | None = None, spacing: int = 0, mark: Mark | None = None
    ) -> None:
        self._library = _zlib()
        self._file = file
        self._spacing = spacing
        self._mark = mark
        self._stream = _ZStream()
        self._buffer = b""
        self._read = begin.packed if begin else 0
        self._raw = begin is not None
        self._ended = False
        self.position = begin.unpacked if begin else 0
        self._last = self.position
        size, version = ctypes.c_int(ctypes.sizeof(_ZStream)), self._library.zlibVersion()
        mode = ctypes.c_int(_RAW if begin else _GZIP)
        self._must(self._library.inflateInit2_(ctypes.byref(self._stream), mode, version, size))
        weakref.finalize(self, self._library.inflateEnd, ctypes.byref(self._stream))
        file.seek(self._read - bool(begin and begin.bits))
        if begin:
            if begin.bits:
                value = file.read(1)[0] >> (8 - begin.bits)
                self._must(self._library.inflatePrime(ctypes.byref(self._stream), begin.bits, value))
            window = ctypes.create_string_buffer(begin.window, len(begin.window))
            self._must(self._library.inflateSetDictionary(ctypes.byref(self._stream), window, len(window)))

    @property
    def packed(self) -> int:
        """Packed bytes that were needed until here."""
        return self._read - int(self._stream.avail_in)

    def read(self, size: int) -> bytes:
        """Return between one and `size` bytes, none only at the end.

        Raises:
            BadArchive: they are damaged or end early.

        """
        output = ctypes.create_string_buffer(size)
        self._stream.next_out = ctypes.addressof(output)
        self._stream.avail_out = size
        while self._stream.avail_out and not self._ended:
            if not self._stream.avail_in and not self._fill():
                raise BadArchive("it is truncated")
            before = self._stream.avail_out
            result = self._library.inflate(ctypes.byref(self._stream), _BLOCK)
            self.position += before - self._stream.avail_out
            if result == _STREAM_END:
                self._ended = not self._next_member()
            elif result not in (_OK, _BUF_ERROR):
                reason = (self._stream.msg or b"").decode("ascii", "replace") or f"zlib error {result}"
                raise BadArchive(f"it is no gzip file or damaged: {reason}")
            else:
                self._mark_here()
        return output.raw[: size - self._stream.avail_out]

    def _mark_here(self) -> None:
        kind = self._stream.data_type
        at_block = kind & 128 and not kind & 64
        if not (self._spacing and self._mark and at_block and self.position - self._last >= self._spacing):
            return
        window, length = ctypes.create_string_buffer(_WINDOW), ctypes.c_uint()
        stream = ctypes.byref(self._stream)
        self._must(self._library.inflateGetDictionary(stream, window, ctypes.byref(length)))
        self._mark(Checkpoint(self.position, self.packed, kind & 7, window.raw[: length.value]))
        self._last = self.position

    def _fill(self) -> bool:
        """Read on; return whether there was more."""
        self._buffer = self._file.read(CHUNK)
        self._read += len(self._buffer)
        self._stream.next_in = ctypes.cast(ctypes.c_char_p(self._buffer), ctypes.c_void_p)
        self._stream.avail_in = len(self._buffer)
        return bool(self._buffer)

    def _next_member(self) -> bool:
        """Go on with the next member (RFC 1952, 2.2) behind zeros, if any; return whether there is one."""
        if self._raw:
            for _ in range(_TRAILER):
                if self._take() is None:
                    raise BadArchive("it is truncated in its trailer")
        byte = self._take()
        while byte == 0:
            byte = self._take()
        if byte is None:
            return False
        if byte != 0x1F:
            raise BadArchive("there is something else behind its end")
        self._raw = False
        stream = ctypes.byref(self._stream)
        self._must(self._library.inflateReset2(stream, ctypes.c_int(_GZIP)))
        left, kept = self._stream.avail_in, self._stream.next_in
        first = ctypes.create_string_buffer(b"\x1f", 1)  # of the header, taken above
        self._stream.next_in, self._stream.avail_in = ctypes.addressof(first), 1
        self._library.inflate(stream, 0)
        self._stream.next_in, self._stream.avail_in = kept, left
        return True

    def _take(self) -> int | None:
        """Return the next packed byte, None at the end."""
        if not self._stream.avail_in and not self._fill():
            return None
        byte = self._buffer[len(self._buffer) - int(self._stream.avail_in)]
        self._stream.next_in += 1
        self._stream.avail_in -= 1
        return byte

    def _must(self, result: int) -> None:
        if result != _OK:
            raise BadArchive(f"zlib cannot unpack it: error {result}")
