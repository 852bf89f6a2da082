"""The members of a zip archive, from its central directory.

Format: PKWARE's APPNOTE 6.3 (https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT), zip64 included;
section numbers below are of it. ``zipfile`` of the standard library reads a central directory of any size
into memory at once, which is why it is not used.
"""

from __future__ import annotations

import calendar
import stat
import struct
import zlib
from collections.abc import Iterator

from modelfs.archives import File, Limits, Member, relative
from modelfs.archives.streams import Deflated, Stored, Stream
from modelfs.errors import BadArchive

STORED, DEFLATED = 0, 8
"""The methods (4.4.5) that we can read."""

MAX_LINK = 4095
"""Most bytes of the target of a symbolic link."""

_END = struct.Struct("<4s4H2LH")  # 4.3.16
_END64 = struct.Struct("<4sQ2H2L4Q")  # 4.3.14
_LOCATOR = struct.Struct("<4sLQL")  # 4.3.15
_CENTRAL = struct.Struct("<4s6H3L5H2L")  # 4.3.12
_LOCAL = struct.Struct("<4s5H3L2H")  # 4.3.7
_COMMENT = 65535
_CHUNK = 256 * 1024

_METHODS = {6: "implode", 9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "zstd", 95: "xz", 98: "PPMd"}
_ENCRYPTED = 0x1 | 0x40 | 0x2000  # 4.4.4: bits 0, 6 and 13
_UTF8 = 0x800
_UNIX, _MAC = 3, 19  # 4.4.2


def members(file: File, size: int, limits: Limits) -> Iterator[Member]:
    """Yield the members of the zip archive `file` of `size` bytes, in the order in which they lie.

    A symbolic link has no target yet: it is the content of the member.

    Raises:
        BadArchive: it is damaged or truncated, its members overlap, or its headers exceed `limits`.

    """
    count, start, stop = _directory(file, size)
    if count > limits.members:
        raise BadArchive(f"it has more than {limits.members} members: raise archives.members if it may")
    found = sorted(_central(file, count, start, stop), key=lambda member: member.offset)
    end = 0
    for member in found:
        if member.offset < end:
            raise BadArchive(f"{member.path!r} overlaps the member before it")
        end = member.offset + _LOCAL.size + member.packed
        if end > start:
            raise BadArchive(f"{member.path!r} reaches into the central directory")
        limits.check_ratio(member.size, member.packed)
        yield member


def content(file: File, member: Member, position: int) -> Stream:
    """Return the content of `member`, at `position` if it is stored, else from its beginning on.

    Raises:
        BadArchive: its local header is not there, or contradicts the central directory.

    """
    file.seek(member.offset)
    raw = file.read(_LOCAL.size)
    if len(raw) != _LOCAL.size or raw[:4] != b"PK\3\4":
        raise BadArchive("it has no local header where the central directory says")
    _, _, flags, method, _, _, _, _, _, name, extra = _LOCAL.unpack(raw)
    if flags & _ENCRYPTED or method != member.method:
        raise BadArchive("its local header contradicts the central directory")
    written = _text(file.read(name), flags)
    if relative(written) != relative(member.path):
        raise BadArchive(f"its local header is that of {written!r}")
    start = member.offset + _LOCAL.size + name + extra
    size = member.size
    if method == STORED:
        return Stored(file, start, size, position)
    return Deflated(file, start, member.packed, size)


def linked(file: File, member: Member) -> Member:
    """Return the symbolic link `member` with its target, which is its content.

    Raises:
        BadArchive: the content is damaged.

    """
    if member.fault:
        return member
    stream = content(file, member, 0)
    target = b"".join(iter(lambda: stream.read(MAX_LINK), b""))
    if f"crc32:{zlib.crc32(target):08x}" != member.digest:
        raise BadArchive(f"the content of {member.path!r} does not have its checksum")
    return member._replace(target=target.decode("utf-8", "surrogateescape"), size=0)


def _directory(file: File, size: int) -> tuple[int, int, int]:
    """Return how many members there are, and where the central directory begins and ends."""
    tail_at = max(0, size - _END.size - _COMMENT - _LOCATOR.size)
    file.seek(tail_at)
    tail = file.read(size - tail_at)
    at = tail.rfind(b"PK\5\6")
    while at >= 0 and at + _END.size + int.from_bytes(tail[at + 20 : at + 22], "little") != len(tail):
        at = tail.rfind(b"PK\5\6", 0, at)  # in the comment of another one
    if at < 0 or len(tail) < at + _END.size:
        raise BadArchive("it has no end of a central directory: it is truncated, or no zip archive")
    _, disk, first, here, count, length, start, _ = _END.unpack_from(tail, at)
    end = tail_at + at
    if at >= _LOCATOR.size and tail[at - _LOCATOR.size : at - _LOCATOR.size + 4] == b"PK\6\7":
        _, disk, end64, disks = _LOCATOR.unpack_from(tail, at - _LOCATOR.size)
        if disk or disks > 1:
            raise BadArchive("it is one of several volumes: join them")
        file.seek(min(end64, size))
        raw = file.read(_END64.size)
        if len(raw) != _END64.size or raw[:4] != b"PK\6\6":
            raise BadArchive("the end of its central directory (zip64) is not where it says")
        _, _, _, _, disk, first, here, count, length, start = _END64.unpack(raw)
        end = end64
    if disk or first or here != count:
        raise BadArchive("it is one of several volumes: join them")
    if start + length != end:
        raise BadArchive("its central directory is not where it says: it is truncated or was prepended to")
    if count * _CENTRAL.size > length:
        raise BadArchive("its central directory is too small for its members")
    return count, start, start + length


def _central(file: File, count: int, start: int, stop: int) -> Iterator[Member]:
    """Yield what the central directory says of each member."""
    file.seek(start)
    buffer, position, left = b"", 0, stop - start
    for _ in range(count):
        if len(buffer) - position < _CENTRAL.size + 3 * 65535 and left:
            more = file.read(min(_CHUNK, left))
            if not more:
                raise BadArchive("it is truncated in its central directory")
            left -= len(more)
            buffer, position = buffer[position:] + more, 0
        if len(buffer) - position < _CENTRAL.size or buffer[position : position + 4] != b"PK\1\2":
            raise BadArchive("its central directory is damaged")
        fields = _CENTRAL.unpack_from(buffer, position)
        name, extra, comment = fields[10:13]
        if len(buffer) - position < _CENTRAL.size + name + extra + comment:
            raise BadArchive("its central directory is damaged")
        at = position + _CENTRAL.size
        yield _member(fields, buffer[at : at + name], buffer[at + name : at + name + extra])
        position = at + name + extra + comment
    if left or position != len(buffer):
        raise BadArchive("it has more members than it says")


def _member(fields: tuple[int, ...], raw: bytes, extra: bytes) -> Member:
    _, made, _, flags, method, time, date, crc, packed, size, _, _, _, disk, _, attributes, offset = fields
    path = _text(raw, flags)
    size, packed, offset, disk = _zip64(extra, size, packed, offset, disk)
    mode = attributes >> 16 if made >> 8 in (_UNIX, _MAC) else 0
    kind = "file"
    fault = ""
    if path.endswith("/") or stat.S_ISDIR(mode):
        kind = "directory"
    elif stat.S_ISLNK(mode):
        kind = "symlink"
    elif stat.S_IFMT(mode) and not stat.S_ISREG(mode):
        fault = "it is a device or a pipe"
    if flags & _ENCRYPTED:
        fault = "it is encrypted: pack it without a password"
    elif kind != "directory" and method not in (STORED, DEFLATED):
        fault = f"it is compressed by {_METHODS.get(method, f'method {method}')}: pack it with deflate"
    elif kind != "directory" and method == STORED and packed != size:
        fault = "its sizes contradict each other"
    elif kind == "symlink" and size > MAX_LINK:
        fault = "its link target is too long"
    elif disk:
        fault = "it is on another volume"
    return Member(
        path,
        kind,  # type: ignore[arg-type]
        0 if kind == "directory" else size,
        offset,
        _seconds(date, time),
        packed=packed,
        method=method,
        digest=f"crc32:{crc:08x}",
        fault=fault,
    )


def _zip64(extra: bytes, size: int, packed: int, offset: int, disk: int) -> tuple[int, int, int, int]:
    """Return the fields that did not fit, from the extra field (4.5.3)."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        data = extra[position + 4 : position + 4 + length]
        if len(data) != length:
            break  # padding that some writers leave (zipalign)
        if kind == 1:
            values = []
            for value, width in (size, 8), (packed, 8), (offset, 8), (disk, 4):
                if value == (0xFFFFFFFF if width == 8 else 0xFFFF):
                    if len(data) < width:
                        raise BadArchive("a zip64 field of it is too short")
                    value, data = int.from_bytes(data[:width], "little"), data[width:]
                values.append(value)
            size, packed, offset, disk = values
            break
        position += 4 + length
    if max(size, packed, offset) > 2**63 - 1:
        raise BadArchive("a size in it is impossible")
    return size, packed, offset, disk


def _seconds(date: int, time: int) -> float:
    """Return the time of MS-DOS (4.4.6), which knows no zone, as if it were UTC."""
    day, month, year = date & 31, date >> 5 & 15, (date >> 9) + 1980
    if not (day and 1 <= month <= 12):
        return 0.0
    return float(calendar.timegm((year, month, day, time >> 11, time >> 5 & 63, (time & 31) * 2)))


def _text(raw: bytes, flags: int) -> str:
    """Return a name (4.4.4, bit 11): UTF-8 if it says so or can be, else as MS-DOS had it."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        if flags & _UTF8:
            return raw.decode("utf-8", "surrogateescape")
        return raw.decode("cp437")
