"""A corpus of archives that must not be shown, or not all of them: each with what is said about it."""

from __future__ import annotations

import io
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

from modelfs.archives import Limits


class Hostile(NamedTuple):
    """An archive and why it, or its one bad member, is refused.

    Attributes:
        name: says what is wrong with it.
        kind: its format.
        data: of the archive.
        reason: a part of what is said.
        whole: whether all of it is refused, not only a member.
        limits: what it must not exceed.

    """

    name: str
    kind: str
    data: bytes
    reason: str
    whole: bool = False
    limits: Limits = Limits()


DEFAULT = Limits()
SMALL = Limits(members=10, size=1024**2, ratio=10, depth=4)

PATHS = {
    "absolute": ("/etc/passwd", "absolute"),
    "absolute twice": ("//etc/passwd", "absolute"),
    "up": ("../evil", "'..'"),
    "up later": ("model/../../evil", "'..'"),
    "up at the end": ("model/..", "'..'"),
    "up alone": ("..", "'..'"),
    "dot inside": ("model/./evil", "'.'"),
    "empty component": ("model//evil", "''"),
    "newline": ("model/a\nb", "control character"),
    "escape": ("model/\x1b[2J", "control character"),
    "delete": ("model/\x7f", "control character"),
    "long component": ("m" * 256, "longer than 255"),
    "long component in bytes": ("\u00e4" * 128, "longer than 255"),
    "deep": ("/".join("d" * 40), "more than 32 components"),
    "long": ("/".join(["n" * 200] * 22), "longer than 4095"),
}
"""Paths that no member may have."""

TARGETS = {
    "absolute": "/etc/passwd",
    "up": "../../etc/passwd",
    "up in the middle": "sub/../../../etc/passwd",
    "up and back": "../../bert/config.json",
    "empty": "",
    "newline": "a\nb",
}
"""Targets that no symbolic link ``model/link`` may have."""


def header(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, **more: object) -> bytes:
    """Return the GNU header of a member."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    for field, value in more.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """Return an extended header with these records, as they are."""
    return header("pax", kind, len(records)) + padded(records)


def record(key: str, value: str) -> bytes:
    """Return one well-formed record of an extended header."""
    body = f" {key}={value}\n".encode("utf-8", "surrogateescape")
    length = len(body)
    while length != len(body) + len(str(length)):
        length = len(body) + len(str(length))
    return str(length).encode() + body


def tar(*parts: bytes) -> bytes:
    """Return an archive of these headers and contents, with the one good member that all of them have."""
    good = b"{}"
    return header("config.json", size=len(good)) + padded(good) + b"".join(parts) + bytes(1024)


def checksummed(raw: bytes) -> bytes:
    """Return a header with the checksum that it should have."""
    blank = raw[:148] + b" " * 8 + raw[156:]
    return raw[:148] + b"%06o\0 " % sum(blank) + raw[156:]


def put(raw: bytes, offset: int, data: bytes) -> bytes:
    return raw[:offset] + data + raw[offset + len(data) :]


def _tars() -> Iterator[Hostile]:
    for name, (path, reason) in PATHS.items():
        yield Hostile(f"path {name}, GNU", "tar", tar(header(path)), reason)
        yield Hostile(f"path {name}, pax", "tar", tar(pax(record("path", path)), header("x")), reason)
        if name not in ("up at the end", "up alone"):
            yield Hostile(f"path {name}, directory", "tar", tar(header(path + "/", tarfile.DIRTYPE)), reason)
        yield Hostile(
            f"path {name}, symbolic link",
            "tar",
            tar(header(path, tarfile.SYMTYPE, linkname="config.json")),
            reason,
        )
        yield Hostile(
            f"path {name}, hard link",
            "tar",
            tar(header(path, tarfile.LNKTYPE, linkname="config.json")),
            reason,
        )
        yield Hostile(
            f"path {name}, global pax",
            "tar",
            tar(pax(record("path", path), tarfile.XGLTYPE), header("x")),
            reason,
        )
    for name, target in TARGETS.items():
        link = header("model/link", tarfile.SYMTYPE, linkname=target)
        yield Hostile(f"link {name}", "tar", tar(link), "link target")
        if target:
            long = pax(record("linkpath", target)) + header("model/link", tarfile.SYMTYPE, linkname="x")
            yield Hostile(f"link {name}, pax", "tar", tar(long), "link target")
        hard = header("model/link", tarfile.LNKTYPE, linkname=target)
        yield Hostile(f"hard link {name}", "tar", tar(hard), "hard link to what is not a file before it")
    for kind, what in {
        tarfile.CHRTYPE: "character device",
        tarfile.BLKTYPE: "block device",
        tarfile.FIFOTYPE: "named pipe",
        b"Z": "unknown type",
        b"V": "unknown type",
        b"M": "unknown type",
        b"D": "unknown type",
    }.items():
        yield Hostile(f"type {kind!r}", "tar", tar(header("x", kind)), what)
        yield Hostile(f"type {kind!r} in a directory", "tar", tar(header("m/x", kind)), what)
    for what, headers in {
        "a directory": [header("d/", tarfile.DIRTYPE), header("x", tarfile.LNKTYPE, linkname="d")],
        "itself": [header("x", tarfile.LNKTYPE, linkname="x")],
        "what comes later": [header("x", tarfile.LNKTYPE, linkname="y"), header("y")],
        "a link": [
            header("s", tarfile.SYMTYPE, linkname="config.json"),
            header("x", tarfile.LNKTYPE, linkname="s"),
        ],
    }.items():
        yield Hostile(f"hard link to {what}", "tar", tar(*headers), "not a file before it")
    for second, what in {"config.json": "same", "./config.json": "with a dot"}.items():
        yield Hostile(f"name twice, {what}", "tar", tar(header(second, size=1) + padded(b"x")), "twice")
    yield Hostile(
        "file and directory", "tar", tar(header("config.json/", tarfile.DIRTYPE)), "taken by a file"
    )
    yield Hostile("directory and file", "tar", tar(header("d/", tarfile.DIRTYPE), header("d")), "twice")
    yield Hostile("implied directory and file", "tar", tar(header("d/x"), header("d")), "twice")
    yield Hostile("inside of a file", "tar", tar(header("config.json/x")), "no directory")
    yield Hostile(
        "inside of a link",
        "tar",
        tar(header("s", tarfile.SYMTYPE, linkname="d"), header("s/x")),
        "no directory",
    )
    yield Hostile(
        "link over a file", "tar", tar(header("config.json", tarfile.SYMTYPE, linkname="x")), "twice"
    )

    def whole(name: str, data: bytes, reason: str, limits: Limits = DEFAULT) -> Hostile:
        return Hostile(name, "tar", data, reason, whole=True, limits=limits)

    full = tar(header("weights.bin", size=5000) + padded(b"w" * 5000))
    for cut in (0, 1, 100, 511, 512, 600, 1024, 1025, 1535, 1536, 4000, 6655, 6656):
        yield whole(f"truncated at {cut}", full[:cut], "truncated")
    for at, what in ((0, "name"), (100, "mode"), (124, "size"), (148, "checksum"), (156, "type")):
        raw = header("x")
        yield whole(f"damaged {what}", tar(put(raw, at, b"\xfe")), "damaged")
    yield whole("noise", bytes(range(256)) * 8, "damaged")
    yield whole("text", b"<html>not found</html>".ljust(1024, b" "), "damaged")
    yield whole("size is no number", tar(checksummed(put(header("x"), 124, b"9999999z\0"))), "damaged")
    yield whole("size is negative", tar(checksummed(put(header("x"), 124, b"\xff" * 12))), "impossible size")
    yield whole("size is huge", tar(checksummed(put(header("x"), 124, b"\x80" + b"\x7f" * 11))), "impossible")
    yield whole("size reaches out", header("x", size=10**12) + bytes(1024), "truncated")
    for kind in (tarfile.GNUTYPE_SPARSE,):
        yield whole("sparse, GNU", tar(header("x", kind)), "sparse")
    yield Hostile("sparse, pax", "tar", tar(pax(record("GNU.sparse.major", "1")), header("x")), "sparse")
    yield Hostile("sparse map, pax", "tar", tar(pax(record("GNU.sparse.map", "0,1")), header("x")), "sparse")
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE):
        yield whole(f"huge extension {kind!r}", tar(header("x", kind, 2**40)), "extended header of")
        yield whole(f"truncated extension {kind!r}", header("x", kind, 1000) + b"a" * 500, "truncated")
        if kind != tarfile.XGLTYPE:
            body = padded(record("path", "y")) if kind == tarfile.XHDTYPE else padded(b"y")
            size = len(record("path", "y")) if kind == tarfile.XHDTYPE else 1
            yield whole(f"extension {kind!r} of nothing", tar(header("x", kind, size) + body), "truncated")
    for name, records in {
        "no length": b"path=x\n",
        "length zero": b"0 path=x\n",
        "length too long": b"99 path=x\n",
        "length too short": b"3 path=x\n",
        "length negative": b"-9 path=x\n",
        "length huge": b"99999999999999999999 path=x\n",
        "no newline": b"10 path=xy",
        "no key": b"6 =xy\n",
        "no equals": b"9 pathxy\n",
        "no value at all": b"3 \n",
    }.items():
        yield whole(f"pax, {name}", tar(pax(records), header("x")), "malformed")
    for size in ("-1", "1e3", "0x10", "9" * 19, "9" * 30, "", " 5", "\u0665"):
        yield whole(f"pax, size {size!a}", tar(pax(record("size", size)), header("x")), "impossible size")
    yield whole("too many members", tar(*(header(f"{n}") for n in range(10))), "more than 10 members", SMALL)
    yield whole("too many refused", tar(*[header("../x")] * 10), "more than 10 members", SMALL)
    yield whole("too many headers", tar(*[pax(record("path", "x"))] * 40), "headers than", SMALL)
    yield whole("too large", tar(header("x", size=2 * 1024**2)), "more than 1048576 bytes", SMALL)
    yield whole(
        "too large together",
        tar(*(header(f"{n}", size=600_000) + bytes(600_064) for n in range(2))),
        "more than 1048576 bytes",
        SMALL,
    )
    yield whole(
        "global headers grow",
        tar(
            *(
                pax(record("path", "x" * 900_000), tarfile.XGLTYPE)
                + pax(record("linkpath", "y" * 900_000), tarfile.XGLTYPE)
                for _ in range(1)
            )
        ),
        "global headers",
    )
    yield Hostile("too deep", "tar", tar(header("a/b/c/d/e")), "more than 4 components", limits=SMALL)


def zipped(*members: tuple[zipfile.ZipInfo | str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """Return a zip archive of these members and the one good member that all have."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", method) as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        archive.writestr("config.json", b"{}")
        for info, data in members:
            archive.writestr(info, data, method)
    return buffer.getvalue()


def named(name: str, mode: int = 0, system: int = 3) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("x")
    info.filename = name
    info.create_system, info.external_attr = system, mode << 16
    return info


def central(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """Return a zip archive with the last record of its central directory changed in place."""
    at = data.rfind(b"PK\1\2")
    end = data.rfind(b"PK\5\6")
    record = change(data[at:end])
    if len(record) != end - at:
        raise ValueError("a change must not move the end")
    return data[:at] + record + data[end:]


def end(data: bytes, offset: int, layout: str, value: int) -> bytes:
    """Return a zip archive with a field of its end record changed."""
    return put(data, data.rfind(b"PK\5\6") + offset, struct.pack(layout, value))


def _zips() -> Iterator[Hostile]:
    for name, (path, reason) in PATHS.items():
        yield Hostile(f"path {name}", "zip", zipped((named(path), b"x")), reason)
        if name not in ("up at the end", "up alone"):
            yield Hostile(f"path {name}, directory", "zip", zipped((named(path + "/"), b"")), reason)
        yield Hostile(f"path {name}, link", "zip", zipped((named(path, 0o120777), b"config.json")), reason)
    for name, target in TARGETS.items():
        link = zipped((named("model/link", 0o120777), target.encode()))
        yield Hostile(f"link {name}", "zip", link, "link target")
    yield Hostile("link too long", "zip", zipped((named("link", 0o120777), b"x" * 5000)), "too long")
    for mode, what in {
        0o020666: "character",
        0o060666: "block",
        0o010666: "pipe",
        0o140777: "socket",
    }.items():
        yield Hostile(f"mode {what}", "zip", zipped((named("x", mode), b"")), "device or a pipe")
    yield Hostile("name twice", "zip", zipped(("x", b"1"), (named("x"), b"2")), "twice")
    yield Hostile("inside of a file", "zip", zipped(("config.json/x", b"")), "no directory")
    yield Hostile("directory over a file", "zip", zipped(("config.json/", b"")), "taken by a file")
    plain = zipped(("x", b"x" * 100))
    for bit, what in {0x1: "classic", 0x40: "strong", 0x2000: "masked"}.items():
        data = central(plain, lambda record, bit=bit: put(record, 8, struct.pack("<H", bit)))
        yield Hostile(f"encrypted, {what}", "zip", data, "encrypted")
    for method in (1, 6, 9, 12, 14, 93, 95, 96, 98, 99, 255):
        data = central(plain, lambda record, m=method: put(record, 10, struct.pack("<H", m)))
        yield Hostile(f"method {method}", "zip", data, "compressed by")
    yield Hostile(
        "stored with two sizes",
        "zip",
        central(plain, lambda record: put(record, 24, struct.pack("<L", 99))),
        "contradict",
    )
    yield Hostile(
        "on another disk",
        "zip",
        central(plain, lambda record: put(record, 34, struct.pack("<H", 3))),
        "another volume",
    )
    yield Hostile("too deep", "zip", zipped(("a/b/c/d/e", b"")), "more than 4 components", limits=SMALL)

    def whole(name: str, data: bytes, reason: str, limits: Limits = DEFAULT) -> Hostile:
        return Hostile(name, "zip", data, reason, whole=True, limits=limits)

    for cut in (0, 1, 4, 30, 100, len(plain) - 30, len(plain) - 21, len(plain) - 1):
        yield whole(f"truncated at {cut}", plain[:cut], "no end of a central directory")
    yield whole("noise", bytes(range(256)) * 40, "no end of a central directory")
    yield whole("text", b"<html>not found</html>", "no end of a central directory")
    yield whole("something before it", b"#!/bin/sh\n" + plain, "not where it says")
    yield whole("something cut off", plain[10:], "not where it says")
    yield whole("several volumes", end(plain, 4, "<H", 1), "several volumes")
    yield whole("begins elsewhere", end(plain, 6, "<H", 1), "several volumes")
    yield whole("more here than there", end(plain, 8, "<H", 1), "several volumes")
    for count in (0, 1):
        fewer = end(end(plain, 8, "<H", count), 10, "<H", count)
        yield whole(f"claims {count} members", fewer, "more members than it says")
    more = end(end(plain, 8, "<H", 60000), 10, "<H", 60000)
    yield whole("claims 60000 members", more, "too small for its members")
    three = end(end(zipped(("x" * 100, b"")), 8, "<H", 3), 10, "<H", 3)
    yield whole("claims three members", three, "damaged")
    yield whole("damaged record", central(plain, lambda record: b"PK\1\7" + record[4:]), "")
    yield whole("name reaches out", central(plain, lambda record: put(record, 28, b"\xff\xff")), "damaged")
    yield whole("extra reaches out", central(plain, lambda record: put(record, 30, b"\xff\xff")), "damaged")
    yield whole("comment reaches out", central(plain, lambda record: put(record, 32, b"\xff\xff")), "damaged")
    yield whole("overlapping", central(plain, lambda record: put(record, 42, b"\0\0\0\0")), "overlaps")
    yield whole(
        "in the directory",
        central(plain, lambda record: put(record, 42, struct.pack("<L", plain.rfind(b"PK\1\2") + 5))),
        "reaches into",
    )
    yield whole(
        "behind the end", central(plain, lambda record: put(record, 42, b"\xf0\xff\xff\x7f")), "reaches"
    )
    yield whole(
        "packed reaches out",
        central(plain, lambda record: put(record, 20, struct.pack("<L", 10**6))),
        "reaches into",
    )
    missing = central(plain, lambda record: put(record, 24, b"\xff\xff\xff\xff"))
    yield whole("zip64 without its field", missing, "250 times")
    wide = named("x")
    wide.extra = struct.pack("<2H", 1, 4) + b"\0" * 4
    short = central(zipped((wide, b"y")), lambda record: put(record, 24, b"\xff\xff\xff\xff"))
    yield whole("zip64 field too short", short, "zip64 field")
    wide.extra = struct.pack("<2HQ", 1, 8, 2**64 - 1)
    huge = central(zipped((wide, b"y")), lambda record: put(record, 24, b"\xff\xff\xff\xff"))
    yield whole("zip64 size impossible", huge, "impossible")
    at = plain.rfind(b"PK\5\6")
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, 10**9, 1)
    yield whole("zip64 end elsewhere", plain[:at] + locator + plain[at:], "zip64")
    volumes = struct.pack("<4sLQL", b"PK\6\7", 0, 0, 5)
    yield whole("zip64, several volumes", plain[:at] + volumes + plain[at:], "several volumes")
    small = zipped(("x", bytes(1000)), method=zipfile.ZIP_DEFLATED)
    bomb = central(small, lambda record: put(record, 24, struct.pack("<L", 80 * 1024**2)))
    yield whole("bomb", bomb, "250 times")
    yield whole("too many members", zipped(*((f"{n}", b"") for n in range(10))), "than 10 members", SMALL)
    yield whole("too large", zipped(("x", bytes(2 * 1024**2))), "more than 1048576 bytes", SMALL)
    wrong = central(zipped((named("s", 0o120777), b"config.json")), lambda r: put(r, 16, b"\1\2\3\4"))
    yield whole("link with another checksum", wrong, "checksum")
    link = zipped((named("s", 0o120777), b"config.json"))
    at = link.rfind(b"PK\3\4")
    yield whole("link without a local header", put(link, at, b"PK\7\7"), "no local header")
    yield whole("link of another name", put(link, at + 30, b"t"), "local header is that of")
    yield whole("link of another method", put(link, at + 8, b"\x08\0"), "contradicts")
    packed = zipped((named("s", 0o120777), b"config.json" * 9), method=zipfile.ZIP_DEFLATED)
    at = packed.rfind(b"PK\3\4")
    yield whole("link of noise", put(packed, at + 31, b"\xff\xff\xff"), "damaged")


CORPUS = [*_tars(), *_zips()]
