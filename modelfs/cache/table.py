"""The block table: the file beside an object's data that says which blocks are there, and their checksums.

A header, then one record per block at ``HEADER_SIZE + index * RECORD_SIZE``; the file ends after the last
record ever written. All integers are little-endian.

======  =====  ===================================================================
offset  bytes  header
======  =====  ===================================================================
0       8      magic ``modelfsT``
8       2      version of this format, 1
10      2      flags: bit 0 = the object matched its published digest
12      4      block size in bytes
16      8      object size in bytes
24      36     zero
60      4      CRC-32C of bytes 0 to 59
======  =====  ===================================================================

A record is the CRC-32C of the block (4 bytes) and a mark (4 bytes): the CRC-32C of ``block`` + index (8
bytes) + checksum, with the lowest bit set. A record that is torn, damaged or in the wrong place has the
wrong mark and means the same as one of zeros: the block is absent.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from modelfs.types import BLOCK, block_count, block_span, crc32c

VERSION = 1
RECORD_SIZE = 8
ABSENT = bytes(RECORD_SIZE)
"""The record of a block that is not there."""

_MAGIC = b"modelfsT"
_VERIFIED = 1
_HEADER = struct.Struct("<8sHHIQ36x")
_CRC = struct.Struct("<I")
_RECORD = struct.Struct("<II")
_MARKED = struct.Struct("<5sQI")

HEADER_SIZE = _HEADER.size + _CRC.size


@dataclass(frozen=True, slots=True)
class Table:
    """What a block table says: the object's size, whether its digest was checked, block → CRC-32C."""

    size: int
    verified: bool
    crcs: Mapping[int, int]

    @property
    def complete(self) -> bool:
        """Whether every block is there."""
        return len(self.crcs) == block_count(self.size)


def present_bytes(blocks: Collection[int], size: int) -> int:
    """Return how many bytes `blocks` of an object of `size` bytes have together."""
    if not blocks:
        return 0
    tail = BLOCK - len(block_span(max(blocks), size))  # only the last block can be shorter
    return len(blocks) * BLOCK - tail


def header(size: int, *, verified: bool) -> bytes:
    """Return the header of the table of an object of `size` bytes."""
    raw = _HEADER.pack(_MAGIC, VERSION, _VERIFIED if verified else 0, BLOCK, size)
    return raw + _CRC.pack(crc32c(raw))


def record(block: int, crc: int) -> bytes:
    """Return the record of a present block."""
    return _RECORD.pack(crc, _mark(block, crc))


def record_offset(block: int) -> int:
    """Return where in the table the record of `block` lies."""
    return HEADER_SIZE + block * RECORD_SIZE


def footprint(size: int) -> int:
    """Return the disk space, in bytes, that the table of an object of `size` bytes may need."""
    return -(-record_offset(block_count(size)) // 4096) * 4096


def parse(raw: bytes) -> Table:
    """Return what the table file with content `raw` says.

    Raises:
        ValueError: if the header is damaged or of another format.

    """
    if len(raw) < HEADER_SIZE or crc32c(raw[: _HEADER.size]) != _CRC.unpack_from(raw, _HEADER.size)[0]:
        raise ValueError("the header is damaged")
    magic, version, flags, block_size, size = _HEADER.unpack_from(raw)
    if (magic, version, block_size) != (_MAGIC, VERSION, BLOCK):
        raise ValueError("the table is of another format")
    if len(raw) > record_offset(block_count(size)):
        raise ValueError("the table is too long")
    whole = (len(raw) - HEADER_SIZE) // RECORD_SIZE * RECORD_SIZE
    crcs = {
        block: crc
        for block, (crc, mark) in enumerate(_RECORD.iter_unpack(raw[HEADER_SIZE : HEADER_SIZE + whole]))
        if mark and mark == _mark(block, crc)
    }
    return Table(size, bool(flags & _VERIFIED), crcs)


def _mark(block: int, crc: int) -> int:
    return crc32c(_MARKED.pack(b"block", block, crc)) | 1
