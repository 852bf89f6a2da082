"""The members of a tar archive, read header by header.

Formats: ustar and pax (POSIX.1-2017, ``pax``, "ustar Interchange Format" and "pax Extended Header"), GNU
(https://www.gnu.org/software/tar/manual/html_node/Standard.html) with long names and base-256 numbers.
``tarfile`` of the standard library reads single headers for us; going from one to the next is done here,
because it takes a damaged header for the end of the archive and reads extended ones of any size.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Mapping
from typing import Literal

from modelfs.archives import File, Limits, Member
from modelfs.errors import BadArchive

HEADER = tarfile.BLOCKSIZE
"""Bytes of a header; contents are padded to a multiple of it."""

MAX_EXTENDED = 1024**2
"""Most bytes of an extended header: names have at most 4 KiB, what else is in there is not needed."""

MAX_FILE = 2**63 - 1
"""Largest size of a file."""

_KINDS: Mapping[bytes, Literal["file", "directory", "symlink", "hardlink"]] = {
    tarfile.REGTYPE: "file",
    tarfile.AREGTYPE: "file",
    tarfile.CONTTYPE: "file",
    tarfile.DIRTYPE: "directory",
    tarfile.SYMTYPE: "symlink",
    tarfile.LNKTYPE: "hardlink",
}
_FAULTS = {
    tarfile.CHRTYPE: "it is a character device",
    tarfile.BLKTYPE: "it is a block device",
    tarfile.FIFOTYPE: "it is a named pipe",
}
_SPARSE = "it is a sparse file: pack it without --sparse"
_LONG = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)


def members(file: File, limits: Limits) -> Iterator[Member]:
    """Yield the members of the tar archive `file` in their order; content is passed over with ``seek``.

    Ends behind the block that marks the end of the archive.

    Raises:
        BadArchive: it is damaged or truncated, or its headers exceed `limits`.

    """
    everywhere: dict[str, str] = {}
    extended: dict[str, str] = {}
    position = 0
    headers = 0
    while True:
        header = _header(file, position)
        if header is None:
            if extended:
                raise BadArchive("it is truncated: an extended header ends it")
            return
        headers += 1
        if headers > 3 * limits.members:
            raise BadArchive("it has more headers than three times archives.members: raise that if it may")
        position += HEADER
        kind = header.type
        if kind in _LONG or kind in _PAX:
            data = _extension(file, header)
            if kind in _LONG:
                extended[_LONG[kind]] = _text(data.partition(b"\0")[0])
            else:
                (everywhere if kind == tarfile.XGLTYPE else extended).update(_records(data))
                if sum(map(len, everywhere)) + sum(map(len, everywhere.values())) > MAX_EXTENDED:
                    raise BadArchive("its global headers are too large")
            position = _padded(position + header.size)
            file.seek(position)
            continue
        if kind == tarfile.GNUTYPE_SPARSE:  # more headers of another form would follow
            raise BadArchive(f"{header.name!r}: {_SPARSE}")
        told = everywhere | extended
        size = _size(header, told)
        yield _member(header, told, size, position)
        extended = {}
        if header.isreg() or kind not in tarfile.SUPPORTED_TYPES:  # nothing follows the header of a link
            position = _padded(position + size)
            file.seek(position)


def _header(file: File, position: int) -> tarfile.TarInfo | None:
    """Return the next header, None at the end of the archive."""
    raw = file.read(HEADER)
    try:
        header = tarfile.TarInfo.frombuf(raw, "utf-8", "surrogateescape")
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
        return None
    except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
        raise BadArchive(f"it is truncated at {position}") from error
    except (tarfile.HeaderError, ValueError, OverflowError) as error:
        raise BadArchive(f"the tar header at {position} is damaged: {error}") from error
    if not 0 <= header.size <= MAX_FILE:
        raise BadArchive(f"the tar header at {position} has an impossible size")
    return header


def _extension(file: File, header: tarfile.TarInfo) -> bytes:
    if header.size > MAX_EXTENDED:
        raise BadArchive(f"it has an extended header of {header.size} bytes")
    data = file.read(header.size)
    if len(data) != header.size:
        raise BadArchive("it is truncated in an extended header")
    return data


def _records(data: bytes) -> Mapping[str, str]:
    """Return the records of a pax header that matter: length, space, key, ``=``, value, newline each."""
    found: dict[str, str] = {}
    position = 0
    while position < len(data) and data[position] != 0:
        match = re.compile(rb"(\d{1,7}) ").match(data, position)
        stop = position + int(match[1]) if match else 0
        if match is None or stop > len(data) or stop <= match.end() or data[stop - 1 : stop] != b"\n":
            raise BadArchive("a pax header of it is malformed")
        key, equals, value = data[match.end() : stop - 1].partition(b"=")
        if not key or not equals:
            raise BadArchive("a pax header of it is malformed")
        name = _text(key)
        found["sparse" if name.startswith("GNU.sparse.") else name] = _text(value)
        position = stop
    return {name: found[name] for name in ("path", "linkpath", "size", "mtime", "sparse") if name in found}


def _size(header: tarfile.TarInfo, told: Mapping[str, str]) -> int:
    if "size" not in told:
        return header.size
    if not re.fullmatch(r"[0-9]{1,19}", told["size"]) or int(told["size"]) > MAX_FILE:
        raise BadArchive("a pax header of it has an impossible size")
    return int(told["size"])


def _member(header: tarfile.TarInfo, told: Mapping[str, str], size: int, offset: int) -> Member:
    mtime = float(header.mtime)
    if re.fullmatch(r"-?[0-9]{1,15}(\.[0-9]*)?", told.get("mtime", "")):
        mtime = float(told["mtime"])
    path, target = told.get("path", header.name), told.get("linkpath", header.linkname)
    kind = _KINDS.get(header.type)
    fault = _FAULTS.get(header.type, "" if kind else f"it is of the unknown type {header.type!r}")
    if "sparse" in told:
        fault = _SPARSE
    kind = kind or "file"
    return Member(path, kind, size if kind == "file" else 0, offset, mtime, target, fault=fault)


def _padded(position: int) -> int:
    return -(-position // HEADER) * HEADER


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")
