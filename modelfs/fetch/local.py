"""Locations that need no network: ``file:`` and ``data:``. Everything here blocks and belongs in a thread."""

from __future__ import annotations

import base64
import binascii
import errno
import os
import re
import stat
from urllib.parse import unquote_to_bytes, urlsplit

from modelfs.errors import AccessDenied, BadAnswer, NotFound, Stale, StoreError, Unavailable
from modelfs.fetch.guard import Sink
from modelfs.types import Location, Span

CHUNK = 1024 * 1024
"""Bytes read from a file at once."""


def read_file(location: Location, span: Span, size: int, sink: Sink) -> None:
    """Read `span` of a ``file:`` URL (RFC 8089) into `sink`.

    The file must still have `location.token` after each read, so that bytes written into it meanwhile are
    never delivered.

    Raises:
        Stale: the file was changed or replaced.
        NotFound, AccessDenied, Unavailable: as the operating system says.
        BadAnswer: the URL names another host or something that is not a file.

    """
    parts = urlsplit(location.url)
    path = unquote_to_bytes(parts.path)
    name = os.fsdecode(path)
    if parts.netloc not in ("", "localhost") or not path.startswith(b"/") or b"\0" in path:
        raise BadAnswer(f"{location.url!r} is not the URL of a local file: write file:///PATH")
    try:
        # Not blocking: whoever put a pipe in the place of the file must not stop this thread.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _failure(name, error) from error
    try:
        _check_token(fd, name, location, size)
        sink.begin(span)
        buffer = memoryview(bytearray(min(CHUNK, len(span))))
        offset = span.start
        while offset < span.stop:
            try:
                count = os.preadv(fd, [buffer[: span.stop - offset]], offset)
            except OSError as error:
                raise _failure(name, error) from error
            _check_token(fd, name, location, size)
            if count == 0:
                raise Stale(f"{name}: ends at {offset}, not at {size}: refresh the model")
            sink.write(offset, buffer[:count])
            offset += count
    finally:
        os.close(fd)


def read_data(location: Location, span: Span, size: int, sink: Sink) -> None:
    """Decode a ``data:`` URL (RFC 2397) and put `span` of its content into `sink`.

    Raises:
        BadAnswer: it is malformed.
        Stale: its content does not have `size` bytes.

    """
    header, comma, payload = location.url.partition(",")
    if not comma:
        raise BadAnswer("malformed data: URL without a comma; report this to the store's author")
    content = unquote_to_bytes(payload)
    if header.lower().endswith(";base64"):
        try:
            content = base64.b64decode(re.sub(rb"\s", b"", content), validate=True)
        except binascii.Error as error:
            raise BadAnswer("malformed base64 in a data: URL; report this to the store's author") from error
    if len(content) != size:
        raise Stale(f"a data: URL holds {len(content)} bytes, not {size}: refresh the model")
    sink.begin(span)
    sink.write(span.start, content[span.start : span.stop])


def _check_token(fd: int, name: str, location: Location, size: int) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise BadAnswer(f"{name}: is not a regular file")
    token = f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
    if status.st_size != size or location.token not in (None, token):
        raise Stale(f"{name}: was changed since it was listed: refresh the model")


def _failure(name: str, error: OSError) -> StoreError:
    text = f"{name}: {error.strerror}"
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR | errno.ELOOP:
            return NotFound(f"{text}: refresh the model")
        case errno.EACCES | errno.EPERM:
            return AccessDenied(f"{text}: let the user of modelfs read it")
        case errno.ESTALE:
            return Stale(f"{text}: refresh the model")
        case _:
            return Unavailable(f"{text}: check the disk or network file system it is on")
