"""One HTTP request and its answer, as the callbacks that curl delivers it to; knows no curl."""

from __future__ import annotations

import re

from modelfs.errors import BadAnswer
from modelfs.fetch.answer import REDIRECTS, accept, redirect
from modelfs.fetch.guard import Sink
from modelfs.stores import redact
from modelfs.stores.reach import Reach, allowed, peer_reach, written_reach
from modelfs.types import Location, Span

GATHER = 256 * 1024
"""Most bytes a sink gets at once over HTTP; much more than the 16 KiB that libcurl delivers at once."""

DISCARD = 64 * 1024
"""Bytes of an error's or redirect's body that are read so that the connection can be used again."""

_STATUS = re.compile(rb"HTTP/[0-9.]+ +([0-9]{3})(?![0-9])")


class Exchange:
    """Judges the answer to one request and passes its body on to the sink.

    No exception may leave a callback: it is kept in `failure`, and curl is told to stop.

    Attributes:
        url: what is requested, without anything that needs encoding.
        reach: of who answers; a server must not be nearer than the one that redirected to it.
        target: where the answer redirects to, or None.
        failure: what went wrong in a callback, or None.

    """

    def __init__(
        self,
        url: str,
        location: Location,
        span: Span,
        size: int,
        sink: Sink,
        buffer: memoryview,
        reach: Reach,
    ) -> None:
        self.url = url
        self.reach = reach
        self.target: str | None = None
        self.failure: BaseException | None = None
        self._location = location
        self._span = span
        self._size = size
        self._sink = sink
        self._status = 0
        self._headers: dict[str, str] = {}
        self._body: Span | None = None
        self._offset = 0
        self._discarded = 0
        self._buffer = buffer
        self._fill = 0

    def on_connected(self, address: str, *_: object) -> int:
        """Judge whom curl is connected to, before anything is asked of it."""
        try:
            self.reach = allowed(self.url, peer_reach(self.url, address), self.reach)
        except BadAnswer as error:
            self.failure = error
            return 1
        return 0

    def on_header(self, line: bytes) -> int | None:
        """Take one line of the head; the blank one at its end decides what becomes of the body."""
        try:
            if self._body is not None:
                return None  # a trailer
            if match := _STATUS.match(line):  # the final answer may follow interim ones
                self._status, self._headers = int(match[1]), {}
            elif line not in (b"\r\n", b"\n"):
                name, _, value = line.decode("latin-1").partition(":")
                key, value = name.lower(), value.strip(" \t\r\n")
                self._headers[key] = f"{self._headers[key]}, {value}" if key in self._headers else value
            elif self._status >= 200:
                self._answered()
        except BaseException as error:
            self.failure = error
            return 0 if self._status in (200, 206) else None
        return None

    def _answered(self) -> None:
        if self._status in REDIRECTS:
            target = redirect(self.url, self._headers)
            allowed(target, written_reach(target), self.reach)
            self.target = target
            return
        place = redact(self.url)
        body = accept(place, self._status, self._headers, self._location, self._span, self._size)
        self._sink.begin(body)
        self._body, self._offset = body, body.start

    def on_body(self, data: memoryview) -> int | None:
        """Gather one piece of the body. This runs for every 16 KiB: nothing but the copy is done here."""
        fill = self._fill
        end = fill + len(data)
        if end > GATHER or self._body is None:
            return self._make_room(data)
        self._buffer[fill:end] = data
        self._fill = end
        return None

    def _make_room(self, data: memoryview) -> int | None:
        if self._body is None:
            self._discarded += len(data)
            return None if self._discarded <= DISCARD else 0
        return 0 if self.on_progress() else self.on_body(data)

    def on_progress(self) -> int:
        """Pass on what was gathered: curl calls this when it has emptied the socket."""
        try:
            self.flush()
        except BaseException as error:
            self.failure = error
            return 1
        return 0

    def flush(self) -> None:
        """Give the sink what was gathered; never a byte behind what the answer announced."""
        if not self._fill or self._body is None:
            return
        data, self._fill = self._buffer[: self._fill], 0
        if self._offset + len(data) > self._body.stop:
            raise BadAnswer(f"{redact(self.url)}: sent more bytes than it announced; try again")
        self._sink.write(self._offset, data)
        self._offset += len(data)

    def finish(self) -> None:
        """Check that the answer was complete.

        Raises:
            BadAnswer: it was not.

        """
        if self._body is None or self._offset != self._body.stop:
            raise BadAnswer(f"{redact(self.url)}: the answer ended early, at byte {self._offset}; try again")
