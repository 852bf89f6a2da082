"""The messages of the FUSE protocol, as bytes: pure functions, no I/O.

Source: ``include/uapi/linux/fuse.h`` of Linux 6.18, protocol 7.45. Integers are in the machine's byte order;
every structure is a multiple of 8 bytes long. A request is a header and a body; a reply is a header and a
body, written at once. What cannot be a message raises `ProtocolError`: the kernel is trusted, a mistake of
ours in reading it is not.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from struct import Struct
from typing import NamedTuple

MAJOR, MINOR = 7, 41
"""The protocol spoken here; what later minor versions add is not used."""

OLDEST_MINOR = 31
"""Linux 5.4: older kernels have other structures."""

FATTR_BLOCK = 512
"""Bytes of a block in ``st_blocks``."""


class Opcode(IntEnum):
    """What a request asks for."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    TMPFILE = 51


class Init(IntFlag):
    """What kernel and daemon agree on in INIT; bits from 32 on travel in ``flags2``."""

    ASYNC_READ = 1 << 0
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    EXPLICIT_INVAL_DATA = 1 << 25
    INIT_EXT = 1 << 30
    PASSTHROUGH = 1 << 37
    HAS_RESEND = 1 << 39


class Opening(IntFlag):
    """How the kernel treats an open file."""

    KEEP_CACHE = 1 << 1
    NOFLUSH = 1 << 5
    PASSTHROUGH = 1 << 7


NOTIFY_INVAL_INODE = 2
NOTIFY_INVAL_ENTRY = 3
"""Code of the notification that a name no longer means what it meant."""

NOTIFY_RESEND = 7
"""Code of the notification that asks for every request again that was read but not answered."""

RESENT = 1 << 63
"""Bit in `Request.unique` of a request that is sent again; its answer has it, too."""

_IN = Struct("=IIQQIIIHH")
_OUT = Struct("=IiQ")
_INIT_IN = Struct("=IIII")
_INIT_OUT = Struct("=IIIIHHIIHHII24x")
_ENTRY = Struct("=QQQQII")
_ATTR = Struct("=QQQQQQIIIIIIIIII")
_ATTR_OUT = Struct("=QII")
_OPEN_OUT = Struct("=QIi")
_KSTATFS = Struct("=QQQQQIIII24x")
_XATTR_OUT = Struct("=II")
_LSEEK_OUT = Struct("=Q")
_DIRENT = Struct("=QQII")
_INVAL_INODE = Struct("=Qqq")
_INVAL_ENTRY = Struct("=QII")
_FORGET_ONE = Struct("=QQ")

BODIES = {
    Opcode.FORGET: Struct("=Q"),
    Opcode.GETATTR: Struct("=IIQ"),
    Opcode.READLINK: Struct("="),
    Opcode.OPEN: Struct("=II"),
    Opcode.OPENDIR: Struct("=II"),
    Opcode.READ: Struct("=QQIIQII"),
    Opcode.READDIR: Struct("=QQIIQII"),
    Opcode.READDIRPLUS: Struct("=QQIIQII"),
    Opcode.STATFS: Struct("="),
    Opcode.RELEASE: Struct("=QIIQ"),
    Opcode.RELEASEDIR: Struct("=QIIQ"),
    Opcode.LISTXATTR: Struct("=II"),
    Opcode.ACCESS: Struct("=II"),
    Opcode.INTERRUPT: Struct("=Q"),
    Opcode.DESTROY: Struct("="),
    Opcode.LSEEK: Struct("=QQII"),
}
"""Bodies of one fixed length; the fields are those of the structure of the same name in fuse.h."""

HEADER_IN = _IN.size
HEADER_OUT = _OUT.size

READ_BUFFER = 128 * 1024
"""Bytes of the buffer for one request: more than any request of a read-only tree has.

The kernel refuses less than 8 KiB or than `MAX_WRITE` and a header; the longest are BATCH_FORGETs.
"""

MAX_WRITE = 4096
"""Bytes of the largest write; nothing is ever written, and the kernel takes no less than a page."""


class ProtocolError(ValueError):
    """What the kernel sent is not what fuse.h says."""


class Request(NamedTuple):
    """One request: its header, and `body`, which is valid until the next request is read."""

    opcode: int
    unique: int
    node: int
    uid: int
    gid: int
    pid: int
    body: memoryview


@dataclass(frozen=True, slots=True)
class Offer:
    """What the kernel can do, from INIT."""

    major: int
    minor: int
    max_readahead: int
    flags: Init


@dataclass(frozen=True, slots=True)
class Terms:
    """What is agreed on with the kernel, for the INIT reply.

    Attributes:
        minor: the protocol's minor version.
        max_readahead: bytes.
        flags: no more than was offered.
        max_background: asynchronous requests in flight before the kernel waits.
        max_pages: pages of 4 KiB in the largest read.
        max_stack_depth: how many file systems a backing file may lie on; 0 without passthrough.

    """

    minor: int
    max_readahead: int
    flags: Init
    max_background: int
    max_pages: int
    max_stack_depth: int


@dataclass(frozen=True, slots=True)
class Attr:
    """``struct fuse_attr`` without what is the same for all files; `mtime` is in seconds."""

    ino: int
    mode: int
    size: int
    mtime: float
    links: int
    uid: int
    gid: int
    blksize: int


def request(message: memoryview) -> Request:
    """Return the request that is `message`.

    Raises:
        ProtocolError: its length is not what it says.

    """
    if len(message) < HEADER_IN:
        raise ProtocolError(f"a request of {len(message)} bytes has no header")
    length, opcode, unique, node, uid, gid, pid, extensions, _ = _IN.unpack_from(message)
    if length != len(message) or extensions * 8 > length - HEADER_IN:
        raise ProtocolError(f"a request of {len(message)} bytes says that it has {length}")
    return Request(opcode, unique, node, uid, gid, pid, message[HEADER_IN : length - extensions * 8])


def fields(opcode: int, body: memoryview) -> tuple[int, ...]:
    """Return the fields of a body of fixed length.

    Raises:
        ProtocolError: the body has another length.

    """
    layout = BODIES[Opcode(opcode)]
    if len(body) != layout.size:
        raise ProtocolError(f"{Opcode(opcode).name}: {len(body)} bytes instead of {layout.size}")
    return layout.unpack(body)


def name(body: memoryview) -> bytes:
    """Return the one name that is the body of a LOOKUP.

    Raises:
        ProtocolError: it does not end with its first NUL.

    """
    raw = bytes(body)
    if len(raw) < 2 or raw.find(0) != len(raw) - 1:
        raise ProtocolError(f"a name of {len(raw)} bytes does not end with its first NUL")
    return raw[:-1]


def getxattr(body: memoryview) -> tuple[int, bytes]:
    """Return the bytes there is room for (0: tell the length) and the attribute's name, from a GETXATTR.

    Raises:
        ProtocolError: it is too short, or its name has no end.

    """
    if len(body) < _XATTR_OUT.size:
        raise ProtocolError(f"GETXATTR: {len(body)} bytes")
    size, _ = _XATTR_OUT.unpack_from(body)
    return size, name(body[_XATTR_OUT.size :])


def forgets(body: memoryview) -> list[tuple[int, int]]:
    """Return the pairs of node and references of a BATCH_FORGET.

    Raises:
        ProtocolError: it does not hold as many as it says.

    """
    if len(body) < _XATTR_OUT.size:
        raise ProtocolError(f"BATCH_FORGET: {len(body)} bytes")
    count, _ = _XATTR_OUT.unpack_from(body)
    rest = body[_XATTR_OUT.size :]
    if len(rest) != count * _FORGET_ONE.size:
        raise ProtocolError(f"BATCH_FORGET: {len(rest)} bytes for {count} nodes")
    return list(_FORGET_ONE.iter_unpack(rest))


def init(body: memoryview) -> Offer:
    """Return what the kernel offers in INIT.

    Raises:
        ProtocolError: it is too short.

    """
    if len(body) < _INIT_IN.size:
        raise ProtocolError(f"INIT: {len(body)} bytes")
    major, minor, max_readahead, flags = _INIT_IN.unpack_from(body)
    if flags & Init.INIT_EXT and len(body) >= _INIT_IN.size + 4:
        flags |= Struct("=I").unpack_from(body, _INIT_IN.size)[0] << 32
    return Offer(major, minor, max_readahead, Init(flags))


def init_out(terms: Terms) -> bytes:
    """Return the body of the INIT reply."""
    flags = int(terms.flags)
    return _INIT_OUT.pack(
        MAJOR,
        terms.minor,
        terms.max_readahead,
        flags & 0xFFFF_FFFF,
        terms.max_background,
        terms.max_background * 3 // 4,
        MAX_WRITE,
        1,  # time stamps count nanoseconds
        terms.max_pages,
        0,
        flags >> 32,
        terms.max_stack_depth,
    )


def header(unique: int, length: int, error: int = 0) -> bytes:
    """Return the header of a reply whose body has `length` bytes; `error` is a positive errno, or 0."""
    return _OUT.pack(_OUT.size + length, -error, unique)


def _duration(seconds: float) -> tuple[int, int]:
    whole = int(seconds)
    return whole, int((seconds - whole) * 1e9)


def attr(value: Attr) -> bytes:
    """Return a ``struct fuse_attr``."""
    nanoseconds = max(0, int(value.mtime * 1e9))
    seconds, part = divmod(nanoseconds, 10**9)
    return _ATTR.pack(
        value.ino,
        value.size,
        -(-value.size // FATTR_BLOCK),
        seconds,
        seconds,
        seconds,
        part,
        part,
        part,
        value.mode,
        value.links,
        value.uid,
        value.gid,
        0,
        value.blksize,
        0,
    )


def entry_out(value: Attr, timeout: float) -> bytes:
    """Return the body of a LOOKUP reply: the node, and the seconds for which all of it holds."""
    seconds, part = _duration(timeout)
    return _ENTRY.pack(value.ino, 0, seconds, seconds, part, part) + attr(value)


def absent_out(timeout: float) -> bytes:
    """Return the body of a LOOKUP reply that says for `timeout` seconds that there is no such name."""
    seconds, part = _duration(timeout)
    return _ENTRY.pack(0, 0, seconds, 0, part, 0) + bytes(_ATTR.size)


def attr_out(value: Attr, timeout: float) -> bytes:
    """Return the body of a GETATTR reply."""
    seconds, part = _duration(timeout)
    return _ATTR_OUT.pack(seconds, part, 0) + attr(value)


def open_out(handle: int, flags: Opening, backing: int = 0) -> bytes:
    """Return the body of an OPEN or OPENDIR reply."""
    return _OPEN_OUT.pack(handle, flags, backing)


def statfs_out(*, blocks: int, files: int, block: int, name_max: int) -> bytes:
    """Return the body of a STATFS reply for a tree with nothing free, in blocks of `block` bytes."""
    return _KSTATFS.pack(blocks, 0, 0, files, 0, block, name_max, block, 0)


def xattr_size_out(size: int) -> bytes:
    """Return the body of a GETXATTR or LISTXATTR reply that tells how many bytes the value has."""
    return _XATTR_OUT.pack(size, 0)


def lseek_out(offset: int) -> bytes:
    """Return the body of an LSEEK reply."""
    return _LSEEK_OUT.pack(offset)


def dirent(ino: int, following: int, mode: int, raw: bytes) -> bytes:
    """Return a ``struct fuse_dirent``: a name, its node's number and type, and where the next one is."""
    padding = -(_DIRENT.size + len(raw)) % 8
    return _DIRENT.pack(ino, following, len(raw), stat.S_IFMT(mode) >> 12) + raw + bytes(padding)


def inval_attributes(node: int) -> bytes:
    """Return the whole notification that the attributes of `node` must be asked for anew; its pages stay."""
    body = _INVAL_INODE.pack(node, -1, 0)
    return _OUT.pack(_OUT.size + len(body), NOTIFY_INVAL_INODE, 0) + body


def inval_entry(parent: int, raw: bytes) -> bytes:
    """Return the whole notification that `raw` in `parent` must be looked up anew."""
    body = _INVAL_ENTRY.pack(parent, len(raw), 0) + raw + b"\0"
    return _OUT.pack(_OUT.size + len(body), NOTIFY_INVAL_ENTRY, 0) + body


def resend() -> bytes:
    """Return the whole notification that asks for the unanswered requests."""
    return _OUT.pack(_OUT.size, NOTIFY_RESEND, 0)
